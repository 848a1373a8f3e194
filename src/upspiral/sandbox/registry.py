"""Backends of sandboxes by name. A new one is a file of its own and a line here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from upspiral.config.models import SandboxConfig
from upspiral.errors import ConfigError, SandboxError
from upspiral.sandbox.base import SandboxBackend

if TYPE_CHECKING:
    from upspiral.sandbox.egress import EgressRecord

EgressListener: TypeAlias = "Callable[[EgressRecord], None]"
TOKEN_VARIABLE = "UPSPIRAL_SANDBOX_TOKEN"
"""The environment variable with the token for a server of sandboxes."""


def _namespace(egress_log: EgressListener | None) -> SandboxBackend:
    from upspiral.sandbox.namespace import NamespaceBackend

    return NamespaceBackend(egress_log=egress_log)


def _process(_egress_log: EgressListener | None) -> SandboxBackend:
    from upspiral.sandbox.process import ProcessBackend

    return ProcessBackend(allow_network=True)


def _docker(egress_log: EgressListener | None) -> SandboxBackend:
    from upspiral.sandbox.container import DockerBackend

    return DockerBackend(egress_log=egress_log)


def _podman(egress_log: EgressListener | None) -> SandboxBackend:
    from upspiral.sandbox.container import PodmanBackend

    return PodmanBackend(egress_log=egress_log)


BACKENDS: Mapping[str, Callable[[EgressListener | None], SandboxBackend]] = {
    "namespace": _namespace, "process": _process, "docker": _docker, "podman": _podman,
}  # fmt: skip
"""Those that make sandboxes on this machine."""


def make_backend(name: str, egress_log: EgressListener | None = None) -> SandboxBackend:
    """One of BACKENDS. Raises ConfigError for another name, SandboxError when this machine cannot have it."""
    if name not in BACKENDS:
        raise ConfigError(f"there is no sandbox backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return BACKENDS[name](egress_log)


async def open_backend(config: SandboxConfig, egress_log: EgressListener | None = None) -> SandboxBackend:
    """The backend of a run. `egress_log` hears of connections out of its sandboxes; those of a server are in the
    server's log. Raises what `make_backend` does, and SandboxError when the server cannot be reached."""
    if config.url is None:
        return make_backend(config.backend, egress_log)
    from upspiral.sandbox.remote import RemoteBackend

    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise ConfigError(
            f"sandbox.url = {config.url!r} wants a token: put your tenant's, or the one that `upspiral sandbox serve` "
            f"printed, into the environment variable {TOKEN_VARIABLE}"
        )
    backend = RemoteBackend(config.url, token)
    try:
        return await backend.connect()
    except BaseException:
        await backend.stop()
        raise


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
