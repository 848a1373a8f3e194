"""The sandbox protocol: isolated places where tools act.

A command that fails is a result, not an exception. SandboxError and its subclasses mean that the infrastructure failed;
whoever meets one masks the rollout and never scores it. docs/design/008-sandboxes.md tells how they are made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from upspiral.errors import CapabilityError
from upspiral.sandbox.environment import check_environment

HOST_IMAGE = "host"
"""The image that is no image: the programs of this machine, read-only."""
WORKSPACE = "/work"
"""Where commands start and where relative paths lead, inside."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sandbox may use."""

    memory_mb: int = 512
    """Of the whole sandbox, files included, where the backend has control groups; else of each process
    (`Capabilities.memory_limit` says which)."""
    memory_counts: Literal["mapped", "writable"] = "mapped"
    """Where memory is limited by process. "mapped": all address space counts. "writable": only private memory that may
    be written counts, for programs such as Node that reserve many gigabytes of address space and touch a small part."""
    processes: int = 64
    disk_mb: int = 256
    """Everything that is written inside, together."""
    inodes: int = 65_536
    """Files, folders and links that are made inside, together."""
    file_mb: int = 64
    """The largest single file that may be written."""
    cpus: float | None = None
    """Cores that it may keep busy; None: all. Only with control groups."""
    cpu_s: int = 30
    """CPU seconds of one process of a command."""
    open_files: int = 1024
    """Of one process."""
    output_bytes: int = 64 * 1024
    """How much of stdout, and of stderr, is kept; the rest is counted and dropped."""
    lifetime_s: float = 4 * 3600.0
    """After this the sandbox is stopped, whoever holds it: longer than a rollout and its grading together."""


@dataclass(frozen=True, slots=True)
class Allow:
    """Egress to some hosts, by a proxy that logs every connection (`sandbox/egress/`)."""

    hosts: tuple[str, ...]
    """Names, or ".example.org" for a domain and all below it; "pypi.org:443" for one port. Without: 80 and 443."""
    networks: tuple[str, ...] = ()
    """Ranges such as "10.0.0.0/8" that these names may lead to although their addresses are not public."""


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What a sandbox should be. `files` are laid out in the workspace before the first command."""

    image: str | Snapshot = HOST_IMAGE
    """A name or digest from `upspiral image list`, HOST_IMAGE, or the snapshot of another sandbox."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = Limits()
    network: Literal["none"] | Allow = "none"
    """There is a loopback inside in either case."""
    forward_sockets: Mapping[int, str] = field(default_factory=dict)
    """Loopback port inside -> path of a unix socket on the host."""
    mounts: Mapping[str, str] = field(default_factory=dict)
    """Folder or file on the host -> where it is seen inside, read-only: a path below /opt, or the path that it has on
    the host if that is in none of the folders that every system has."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """For people and metrics, such as the rollout's id."""

    def __post_init__(self) -> None:
        """Raises ValueError for what can be no environment: nothing is started for it."""
        check_environment(self.env)


@dataclass(frozen=True, slots=True)
class Command:
    """A bash command line and what it runs with."""

    script: str
    stdin: bytes = b""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = WORKSPACE
    """Relative to the workspace, or absolute."""
    output_bytes: int | None = None
    """Instead of the sandbox's limit."""
    op_id: str = ""
    """A second command of the same id is not run: it gets the result of the first, or waits for it."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a command ended."""

    exit_code: int | None
    """As a shell gives it: 128 + the signal when a signal ended it. None when it was killed at its deadline."""
    stdout: bytes
    stderr: bytes
    timed_out: bool = False
    oom: bool = False
    """The kernel killed something of it for want of memory; only with control groups."""
    dropped_bytes: int = 0
    """Of output beyond the limit."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of the command and all that it waited for."""
    peak_mb: float = 0.0
    """Resident memory of its largest process, in which an agent's own may be counted (some 15 MB)."""

    @property
    def truncated(self) -> bool:
        return self.dropped_bytes > 0


class Process(Protocol):
    """A program that runs inside while its owner does other things."""

    def output(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes]]:
        """What it writes, as it comes, to the end. What nobody reads stops the program in time, as a pipe does."""
        ...

    async def write(self, content: bytes) -> None:
        """To its stdin. BrokenPipeError when it is closed."""
        ...

    async def close_stdin(self) -> None: ...

    async def kill(self, signal: int = 9) -> None:
        """To it and everything that it started."""
        ...

    async def wait(self, *, timeout_s: float) -> ExecResult:
        """Without the output. DeadlineError when it still runs after that; it then runs on."""
        ...


class Shell(Protocol):
    """One bash that stays: working directory, variables and functions last from one command to the next."""

    restored: Literal["new", "replayed", "live"]
    """How it came about in a fork: by its commands run again, or with all that ran in it."""

    async def run(self, command: str, *, timeout_s: float) -> ExecResult:
        """At its deadline the command is killed and the shell goes on; if it cannot, the next command has a new one,
        and the result's stderr says so."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Diff:
    """What was written since the sandbox began, or since its image."""

    archive: bytes
    """A tar of the files, folders and links that are new or changed, from the root."""
    removed: Sequence[str]
    """Absolute paths."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of a sandbox at one moment, without its processes. It lasts until it is dropped by its backend or that
    stops."""

    id: str
    how: Literal["sealed", "copied"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do. A spec that asks for more is refused at `acquire`, with CapabilityError."""

    isolation: Literal["none", "process", "namespace", "container", "vm"]
    untrusted: bool
    """Made for code that nobody has read."""
    network_none: bool
    forward_sockets: bool
    egress: bool = False
    images: bool = False
    mounts: bool = False
    memory_limit: Literal["none", "process", "sandbox"] = "none"
    disk_quota: bool = False
    cpu_limit: bool = False
    snapshot: bool = False
    """And with it fork and restore."""
    shell_fork: Literal["none", "replay", "live"] = "none"
    connect: bool = False
    browser: bool = False

    def check(self, spec: SandboxSpec, *, backend: str) -> None:
        """Raises CapabilityError for what `spec` asks and the backend cannot do, naming all of it."""
        asked = {
            'network = "none"': spec.network != "none" or self.network_none,
            "an egress allow-list": spec.network == "none" or self.egress,
            "forward_sockets": not spec.forward_sockets or self.forward_sockets,
            f"image {spec.image!r}": not isinstance(spec.image, str) or spec.image == HOST_IMAGE or self.images,
            "a snapshot as image": not isinstance(spec.image, Snapshot) or self.snapshot,
            "mounts": not spec.mounts or self.mounts,
            "limits.cpus": spec.limits.cpus is None or self.cpu_limit,
        }
        if lacking := [name for name, possible in asked.items() if not possible]:
            raise CapabilityError(
                f"the {backend} backend cannot do {', '.join(lacking)}; `upspiral doctor` says which backend can"
            )


class Sandbox(Protocol):
    """One live sandbox. Paths are absolute, or relative to its workspace. All methods raise SandboxError when the
    sandbox is broken and SandboxGoneError when it was stopped, and CapabilityError for what its backend cannot do."""

    @property
    def id(self) -> str: ...

    async def exec(self, command: str | Command, *, timeout_s: float) -> ExecResult:
        """Runs a bash command line to its end. What it left running goes on and can be reached by later commands."""
        ...

    async def spawn(self, command: str | Command) -> Process: ...

    async def shell(self) -> Shell: ...

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """The beginning of a regular file. FileNotFoundError when there is none."""
        ...

    async def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """Makes or replaces a file and the folders above it. OSError when something else is in its place, or when the
        disk is full."""
        ...

    async def list_files(self, path: str = WORKSPACE) -> Sequence[str]:
        """All regular files below a folder, relative to it, sorted. OSError when their names take more than 64 MiB."""
        ...

    async def upload(self, archive: bytes, path: str = WORKSPACE) -> None:
        """Unpacks a tar into a folder."""
        ...

    async def download(self, path: str = WORKSPACE, *, max_bytes: int = 1 << 28) -> bytes:
        """A folder as a tar. OSError when it is larger."""
        ...

    async def diff(self) -> Diff:
        """OSError when it is larger than the sandbox's disk, as files with holes can make it."""
        ...

    async def snapshot(self) -> Snapshot: ...

    async def fork(self, count: int = 1) -> Sequence[Sandbox]:
        """Sandboxes with the same files and shells; whoever forks them stops them. They end with their backend."""
        ...

    async def restore(self, snapshot: Snapshot) -> None:
        """Puts a snapshot's files in the place of this sandbox's; everything that ran is gone."""
        ...

    async def connect(self, port: int) -> ByteStream:
        """A connection to a TCP port that something inside listens on. ConnectionRefusedError when nothing does,
        OSError when what does takes nobody in."""
        ...

    async def stop(self) -> None:
        """Kills everything inside and removes every trace. Safe to call twice."""
        ...


class ByteStream(Protocol):
    """A connection, as of asyncio but closed at once."""

    async def read(self) -> bytes:
        """Some bytes; none at the end."""
        ...

    async def write(self, content: bytes) -> None: ...

    async def close(self) -> None: ...


class SandboxBackend(Protocol):
    """Makes sandboxes."""

    @property
    def capabilities(self) -> Capabilities: ...

    def acquire(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """A fresh sandbox, stopped when the context ends. Raises CapabilityError for a spec this backend cannot
        honour and SandboxError when none can be made."""
        ...

    async def drop(self, snapshot: Snapshot) -> None:
        """Forgets a snapshot; sandboxes made of it are not touched."""
        ...

    async def stop(self) -> None:
        """Stops every sandbox that still lives."""
        ...
