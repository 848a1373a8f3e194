"""Sandboxes made of Linux namespaces: no daemon, no root needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upspiral.sandbox.namespace.backend import NamespaceBackend

__all__ = ["NamespaceBackend"]


def __getattr__(name: str) -> object:
    """Late, because a keeper is a part of this package, and what it imports is copied into every sandbox."""
    if name != "NamespaceBackend":
        raise AttributeError(f"module {__name__} has no {name}")
    from upspiral.sandbox.namespace.backend import NamespaceBackend

    return NamespaceBackend
