"""Sandboxes of a server that runs elsewhere, or in another process of this machine."""

from upspiral.sandbox.remote.backend import RemoteBackend

__all__ = ["RemoteBackend"]
