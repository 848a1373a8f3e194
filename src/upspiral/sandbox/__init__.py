"""Isolated places where tools act."""
