"""How an agent should behave: told by whoever starts it, once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Confinement:
    """What the agent gives up for good, itself and all that it will start, where nothing else confines it: new
    privileges, system calls, and files by Landlock where the kernel has it."""

    readable: tuple[str, ...] = ()
    """Paths below which may be read and executed. None of these and none below: Landlock is not used."""
    writable: tuple[str, ...] = ()
    """Paths below which everything is allowed."""
    system_calls: str = ""
    """A seccomp filter (`namespace/seccomp.py`), hexadecimal; it comes on top of those that hold already."""


@dataclass(frozen=True)
class Settings:
    """Plain data: `to_json` and `from_json` carry it over a wire; a keeper may make one and fork.

    The keeper's side of the bargain: before `serve` is called the namespaces stand, the root is the sandbox's own and
    every descriptor but the socket, 0, 1, 2 and those named here is closed.
    """

    workspace: str = "/work"
    """Where it really is. Paths that begin with /work mean this folder."""
    env: dict[str, str] = field(default_factory=dict)
    """The whole environment of commands, PATH and HOME included; a command adds its own to it."""
    uid: int | None = None
    """Whom commands and files belong to; None: whoever the agent is. Changing it takes CAP_SETUID and CAP_SETGID, which
    the agent then keeps and commands lose. An agent that has changed it has lost its parent-death signal."""
    gid: int | None = None
    """None: the same number as uid."""
    groups: tuple[int, ...] = ()
    """Supplementary groups; not touched where uid is None."""
    rlimits: dict[str, int] = field(default_factory=dict)
    """Of each process of a command, hard and soft: "AS", "DATA", "FSIZE", "STACK", "CORE" in bytes, "CPU" in seconds,
    "NPROC", "NOFILE". The agent itself is not limited by them. What is higher than the agent's own hard limit is
    lowered to that. FSIZE holds for files that the host writes, too."""
    output_bytes: int = 64 * 1024
    """How much of stdout, and of stderr, is kept of a command that does not say."""
    forward_ports: tuple[int, ...] = ()
    """Loopback ports to listen on, from before the first command; each caller is an operation that the agent opens."""
    is_init: bool = False
    """PID 1, or a subreaper: orphans become its children, and it reaps them. (It reaps whatever it gets in any case;
    this makes it ask to be a subreaper when it is not PID 1.)"""
    oom_fd: int | None = None
    """A descriptor of the control group's memory.events (v2) or memory.oom_control (v1), open for reading: by its count
    of kills a command is told to have died for want of memory. None: not known."""
    oom_paths: tuple[str, ...] = ()
    """Where else that file may be: the first that there is is opened, where nobody could open it before."""
    oom_score_adj: int = 500
    """Of commands, so that the kernel prefers them to the agent."""
    proc_fd: int | None = None
    """An open /proc that can be written, where the one that commands see cannot. By it a command's bash takes
    `oom_score_adj`, before it lets go of it: no command can take that back, as many small ones might to have the agent
    killed in their place. None: there is but one /proc."""
    orphan_s: float = 0.0
    """How long the agent stays when it has no connection, where it listens for new ones. 0: it ends with its socket."""
    confinement: Confinement | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """Raises TypeError for a key that there is not."""
        listed = _with_tuples(values)
        if confinement := listed.pop("confinement", None):
            listed["confinement"] = Confinement(**_with_tuples(confinement))
        return cls(**listed)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
