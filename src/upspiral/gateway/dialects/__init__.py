"""Translations between wire APIs and Message."""
