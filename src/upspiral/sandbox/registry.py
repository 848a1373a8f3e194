"""Backends of sandboxes by name. A new one is a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from upspiral.errors import ConfigError
from upspiral.sandbox.base import SandboxBackend


def _namespace() -> SandboxBackend:
    from upspiral.sandbox.namespace import NamespaceBackend

    return NamespaceBackend()


def _process() -> SandboxBackend:
    from upspiral.sandbox.process import ProcessBackend

    return ProcessBackend(allow_network=True)


BACKENDS: Mapping[str, Callable[[], SandboxBackend]] = {"namespace": _namespace, "process": _process}


def make_backend(name: str) -> SandboxBackend:
    """Raises ConfigError for a name that there is not, SandboxError when this machine cannot have it."""
    if name not in BACKENDS:
        raise ConfigError(f"there is no sandbox backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name]()


def sweep() -> list[str]:
    """Removes what backends of processes that died have left on this machine, and says what it was."""
    from upspiral.sandbox.namespace.leftovers import sweep as sweep_namespaces
    from upspiral.sandbox.process import sweep as sweep_processes

    return [str(path) for path in (*sweep_namespaces(None), *sweep_processes(None))]
