"""What a spec names of the machine that a backend is on: sockets to forward and files to mount."""

from __future__ import annotations

import os

from upspiral.errors import CapabilityError
from upspiral.sandbox.base import SandboxSpec

_SYSTEM_FOLDERS = {"", "bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "opt", "proc", "run", "sbin"}
_SYSTEM_FOLDERS |= {"sys", "tmp", "usr", "var", "work"}
"""Where no mount may lie by its own path."""


def check_host_paths(spec: SandboxSpec) -> None:
    """Raises CapabilityError for a socket or a mount that cannot be."""
    for port, path in spec.forward_sockets.items():
        if not 0 < port < 65536:
            raise CapabilityError(f"forward_sockets: {port} is not a port; use 1 to 65535")
        if not os.path.exists(path):
            raise CapabilityError(f"forward_sockets[{port}]: there is no socket at {path}")
    for path, inside in spec.mounts.items():
        if not os.path.exists(path):
            raise CapabilityError(f"mounts: there is nothing at {path} to be mounted at {inside}")
        own = inside == os.path.realpath(path) and inside.split("/")[1] not in _SYSTEM_FOLDERS
        if os.path.normpath(inside) != inside or not (own or inside.startswith("/opt/")):
            raise CapabilityError(f"mounts[{path}]: {inside!r} is no path below /opt; use one such as /opt/agent")
