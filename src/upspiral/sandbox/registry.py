"""Backends of sandboxes by name. A new one is a file of its own and a line here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from upspiral.errors import ConfigError, SandboxError
from upspiral.sandbox.base import SandboxBackend


def _namespace() -> SandboxBackend:
    from upspiral.sandbox.namespace import NamespaceBackend

    return NamespaceBackend()


def _process() -> SandboxBackend:
    from upspiral.sandbox.process import ProcessBackend

    return ProcessBackend(allow_network=True)


def _docker() -> SandboxBackend:
    from upspiral.sandbox.container import DockerBackend

    return DockerBackend()


def _podman() -> SandboxBackend:
    from upspiral.sandbox.container import PodmanBackend

    return PodmanBackend()


BACKENDS: Mapping[str, Callable[[], SandboxBackend]] = {
    "namespace": _namespace, "process": _process, "docker": _docker, "podman": _podman,
}  # fmt: skip


def make_backend(name: str) -> SandboxBackend:
    """Raises ConfigError for a name that there is not, SandboxError when this machine cannot have it."""
    if name not in BACKENDS:
        raise ConfigError(f"there is no sandbox backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]()


def sweep() -> list[str]:
    """Removes what backends of processes that died have left on this machine, and says what it was."""
    from upspiral.sandbox.container.engine import Engine
    from upspiral.sandbox.container.leftovers import sweep as sweep_containers
    from upspiral.sandbox.namespace.leftovers import sweep as sweep_namespaces
    from upspiral.sandbox.process import sweep as sweep_processes

    removed = [str(path) for path in (*sweep_namespaces(None), *sweep_processes(None))]
    for name in ("docker", "podman"):
        with contextlib.suppress(SandboxError):  # there is no such engine here, or it does not run
            removed += sweep_containers(Engine.find(name, name), None)
    return removed
