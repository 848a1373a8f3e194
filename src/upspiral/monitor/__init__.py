"""Metrics, live progress and the report."""
