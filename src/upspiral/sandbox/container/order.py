"""What a spec becomes: the arguments of `run`, and what the agent inside is told."""

from __future__ import annotations

import csv
import io
import os
import re
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from upspiral.errors import CapabilityError
from upspiral.sandbox import inside
from upspiral.sandbox.base import WORKSPACE, SandboxSpec
from upspiral.sandbox.connected import settings_for
from upspiral.sandbox.container.doorway import SOCKET_NAME
from upspiral.sandbox.container.engine import Abilities
from upspiral.sandbox.container.host_image import USER_ID, mounted_folders
from upspiral.sandbox.inside.settings import Confinement, Settings
from upspiral.sandbox.namespace.seccomp import filter_program

OWNER_LABEL = "upspiral.owner"
_AGENT, _DOORWAY = "/run/upspiral/agent", "/run/upspiral/doorway"
_AGENT_MEMORY_MB = 24
_AGENT_PROCESSES = 2
"""The agent's own count to the same limits."""
_MIN_OPEN_FILES = 4096
_MAX_USER_PROCESSES = 1 << 15
"""Of all containers together, where they have one user. Podman 4.3 may not give more, whatever this process may."""
_ROOT_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "SETGID", "SETUID")
"""What makes the root of an image master of its files, so that packages install. Nothing that reaches beyond them."""
_OOM_PATHS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a container is made of."""

    image: str
    """An id, or a name that only this backend gives."""
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = WORKSPACE
    is_host: bool = False
    """The machine's own programs are mounted, and commands run as an ordinary user; else as root of the image."""


def agent_settings(spec: SandboxSpec, origin: Origin, abilities: Abilities) -> Settings:
    """What a control group limits for all of the sandbox, no limit of single processes has to."""
    settings = settings_for(spec, origin.workdir)
    grouped = {"AS", "DATA"} if abilities.memory else set()
    grouped |= {"NPROC"} if abilities.processes else set()
    return replace(
        settings,
        env={**settings.env, **origin.env, **spec.env},
        rlimits={name: value for name, value in settings.rlimits.items() if name not in grouped},
        is_init=True,
        oom_paths=_OOM_PATHS,
        # On top of the engine's own: that one lets a command set limits and priorities of its agent, by which it could
        # pass for a broken sandbox and not be graded, and Podman's lets it make user namespaces.
        confinement=Confinement(system_calls=filter_program().hex()),
    )


def run_arguments(
    name: str, owner: str, spec: SandboxSpec, origin: Origin, abilities: Abilities, doorway: Path
) -> Sequence[str]:
    """Of Docker's or Podman's program. The container is removed when its agent ends."""
    return [
        "run", "--detach", "--rm", f"--name={name}", f"--label={OWNER_LABEL}={owner}", "--pull=never",
        "--network=none", "--hostname=sandbox", "--log-driver=none", "--no-healthcheck",
        *_confinement(origin), *_limits(spec, abilities), *_mounts(spec, origin, doorway),
        "--workdir=/", "--entrypoint=python3", origin.image,
        "-I", "-S", _AGENT, f"to:{_DOORWAY}/{SOCKET_NAME}",
    ]  # fmt: skip


def _confinement(origin: Origin) -> Iterator[str]:
    """The engine's filter of system calls stays as it is; the agent adds one."""
    yield from ("--security-opt=no-new-privileges", "--cap-drop=ALL")
    if origin.is_host:
        yield f"--user={USER_ID}:{USER_ID}"
    else:
        yield "--user=0:0"
        yield from (f"--cap-add={name}" for name in _ROOT_CAPABILITIES)


def _limits(spec: SandboxSpec, abilities: Abilities) -> Iterator[str]:
    limits = spec.limits
    if abilities.memory:
        memory = f"{limits.memory_mb + _AGENT_MEMORY_MB}m"
        yield from (f"--memory={memory}", f"--memory-swap={memory}")  # the two together: no swap
    if abilities.processes:
        yield f"--pids-limit={limits.processes + _AGENT_PROCESSES}"
    if limits.cpus is not None:
        yield f"--cpus={limits.cpus:g}"
    # Said, because engines ask for more than they may give where they themselves are contained.
    open_files = min(max(limits.open_files, _MIN_OPEN_FILES), _hard_limit(resource.RLIMIT_NOFILE))
    processes = min(_MAX_USER_PROCESSES, _hard_limit(resource.RLIMIT_NPROC))
    yield from (f"--ulimit=nofile={open_files}:{open_files}", f"--ulimit=nproc={processes}:{processes}")


def _hard_limit(kind: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return 1 << 20 if hard == resource.RLIM_INFINITY else hard


def check_mounts(spec: SandboxSpec) -> None:
    """Raises CapabilityError for a folder in which something else is mounted: engines make that visible, too, and many
    of them (Docker before 25, Podman) leave it writable."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    places = [re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4]) for line in lines]
    for path in spec.mounts:
        folder = os.path.realpath(path)
        if inner := [each for each in places if each.startswith(f"{folder.rstrip('/')}/")]:
            raise CapabilityError(
                f"mounts: {inner[0]} is a mount of its own inside {path}, which an engine might leave writable; mount "
                "folders without others in them, or take the namespace backend"
            )


def _mounts(spec: SandboxSpec, origin: Origin, doorway: Path) -> Iterator[str]:
    """All read-only."""
    if origin.is_host:
        yield from (_mount(folder, folder) for folder in mounted_folders())
    yield _mount(next(iter(inside.__path__)), _AGENT)
    yield _mount(str(doorway), _DOORWAY)
    yield from (_mount(os.path.realpath(path), place) for path, place in spec.mounts.items())


def _mount(source: str, target: str) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["type=bind", f"source={source}", f"target={target}", "readonly"])
    return f"--mount={line.getvalue()}"
