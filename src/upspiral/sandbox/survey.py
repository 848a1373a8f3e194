"""Which backends of sandboxes this machine can have: what each makes its sandboxes of here, or what it lacks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from upspiral.errors import SandboxError
from upspiral.sandbox.base import Capabilities, SandboxBackend, SandboxSpec
from upspiral.sandbox.container.engine import Engine
from upspiral.sandbox.inside.confine import landlock_abi
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.sandbox.namespace.keeper.control_groups import mounted_hierarchies
from upspiral.sandbox.process import ProcessBackend

DEFAULT_BACKEND = "namespace"
"""Where nobody chose another: made for code that nobody has read, without a daemon, with or without root."""
_TRIAL_S = 20.0
_ENGINE_S = 10.0
_SIGNALS_ABI = 6


@dataclass(frozen=True, slots=True)
class Surveyed:
    """One backend on this machine."""

    backend: str
    works: bool
    found: str
    """For people: how it works here, or why it does not and what to do."""


def survey() -> Iterator[Surveyed]:
    """The default first. Namespace and process sandboxes are made and used; Docker and Podman are asked whether they
    answer. Nothing is left of it."""
    yield _looked_at("namespace", _try_namespace)
    yield _looked_at("process", _try_process)
    for name in ("docker", "podman"):
        yield _looked_at(name, lambda name=name: _ask_engine(name))


def _looked_at(name: str, look: Callable[[], str]) -> Surveyed:
    try:
        return Surveyed(name, True, look())
    except SandboxError as error:
        return Surveyed(name, False, str(error))
    except TimeoutError:
        return Surveyed(name, False, f"no sandbox ran a command within {_TRIAL_S:.0f} s")


def _try_namespace() -> str:
    backend = NamespaceBackend()
    can = backend.capabilities
    ran = asyncio.run(_trial(backend))
    who = "as root, with a user id for each sandbox" if os.geteuid() == 0 else f"as user {os.geteuid()}, without root"
    return "; ".join((who, *_of_namespaces(can), ran))


def _of_namespaces(can: Capabilities) -> Iterator[str]:
    if can.images:
        yield "layered files (overlayfs)"
    else:
        yield "no layers, and so no images, snapshots and forks (Linux 6.6 has what they need)"
    if can.memory_limit == "sandbox":
        yield f"control groups v{_version_of_control_groups()} limit memory, processes and cores"
    else:
        yield "no control groups, so memory is limited by process and cores are not (root has them, or `Delegate=yes`)"


def _version_of_control_groups() -> int:
    """Version 2 may be mounted beside version 1, without a controller."""
    try:
        controllers = Path(mounted_hierarchies()[""], "cgroup.controllers").read_text().split()
    except (KeyError, OSError):
        return 1
    return 2 if "memory" in controllers else 1


def _try_process() -> str:
    ran = asyncio.run(_trial(ProcessBackend(allow_network=True)))
    abi = landlock_abi()
    if abi:
        kept = f"Landlock {abi} keeps it from other files" + (" and processes" if abi >= _SIGNALS_ABI else "")
    else:
        kept = "nothing keeps it from your files, since this kernel has no Landlock (Linux 5.13, and lsm=landlock)"
    return f"for code that you trust: it has the machine's network; {kept}; {ran}"


def _ask_engine(name: str) -> str:
    can = Engine.find(name, name).abilities(timeout_s=_ENGINE_S)
    limited = [
        what for what, is_so in (("memory", can.memory), ("processes", can.processes), ("cores", can.cpus)) if is_so
    ]
    limits = (
        f"limits {', '.join(limited)} of a sandbox"
        if limited
        else "has no control groups: memory is limited by process"
    )
    return f"answers, and {limits}"


async def _trial(backend: SandboxBackend) -> str:
    try:
        async with asyncio.timeout(_TRIAL_S), backend.acquire(SandboxSpec()) as sandbox:
            done = await sandbox.exec("echo up", timeout_s=_TRIAL_S / 2)
    finally:
        await backend.stop()
    if done.stdout != b"up\n":
        raise SandboxError(f"a command did not run in a sandbox: {done}")
    return f"a command ran in {done.wall_s * 1000:.0f} ms"
