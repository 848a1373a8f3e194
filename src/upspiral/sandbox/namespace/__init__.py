"""Sandboxes made of Linux namespaces by bubblewrap: no daemon, no image, no root needed."""

from upspiral.sandbox.namespace.backend import NamespaceBackend

__all__ = ["NamespaceBackend"]
