"""The sandbox protocol: isolated places where tools act.

A command that fails is a result, not an exception. SandboxError means that the infrastructure failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sandbox may use."""

    memory_mb: int = 512
    """Of each process."""
    memory_counts: Literal["mapped", "writable"] = "mapped"
    """"mapped": all address space counts. "writable": only private memory that may be written counts, for programs
    such as Node that reserve many gigabytes of address space and touch a small part."""
    processes: int = 64
    file_mb: int = 64
    """The largest single file that may be written."""
    cpu_s: int = 30
    """CPU seconds of one command."""
    output_bytes: int = 64 * 1024
    """How much of stdout, and of stderr, is kept; the rest is counted and dropped."""


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What a sandbox should be. `files` are laid out in the workspace before the first command."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = Limits()
    network: Literal["none"] = "none"
    forward_sockets: Mapping[int, str] = field(default_factory=dict)
    """Loopback port inside -> path of a unix socket on the host. The only way out of a sandbox."""
    mounts: Mapping[str, str] = field(default_factory=dict)
    """Folder or file on the host -> where it is seen inside, read-only; a path below /opt."""


@dataclass(frozen=True, slots=True)
class ExecResult:
    """How a command ended."""

    exit_code: int | None
    """As a shell gives it: 128 + the signal when a signal ended it. None when it was killed at its deadline."""
    stdout: bytes
    stderr: bytes
    timed_out: bool
    truncated: bool
    wall_s: float


@dataclass(frozen=True, slots=True)
class Capabilities:
    isolation: Literal["none", "process", "namespace", "container", "vm"]
    network_none: bool
    forward_sockets: bool


class Sandbox(Protocol):
    """One live sandbox. Paths are relative to its workspace, which is also the working directory of commands."""

    async def exec(
        self, command: str, *, timeout_s: float, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> ExecResult:
        """Runs a shell command. Raises SandboxError when the sandbox itself is broken or stopped."""
        ...

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """Raises FileNotFoundError when there is no such regular file inside the workspace."""
        ...

    async def write(self, path: str, content: bytes) -> None: ...

    async def list_files(self) -> Sequence[str]:
        """All regular files of the workspace, sorted."""
        ...

    async def stop(self) -> None:
        """Kills everything inside and removes the workspace. Safe to call twice."""
        ...


class SandboxBackend(Protocol):
    """Makes sandboxes."""

    @property
    def capabilities(self) -> Capabilities: ...

    def acquire(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """A fresh sandbox, stopped when the context ends. Raises CapabilityError for a spec this backend cannot
        honour and SandboxError when none can be made."""
        ...

    async def stop(self) -> None:
        """Stops every sandbox that still lives."""
        ...
