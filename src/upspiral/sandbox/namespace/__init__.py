"""Sandboxes made of Linux namespaces."""
