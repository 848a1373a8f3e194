"""A sandbox in memory that runs nothing: for tests of what happens around sandboxes, failures above all."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from upspiral.errors import SandboxError
from upspiral.sandbox.base import Capabilities, ExecResult, SandboxSpec

Respond = Callable[[str, dict[str, bytes]], ExecResult]
"""From a command and the files, which it may change, to the result."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong. Commands of a sandbox are numbered from 0."""

    start_failures: int = 0
    """So many sandboxes, the first ones, cannot be made."""
    hang_at: int | None = None
    """This command never returns, its deadline notwithstanding."""
    break_at: int | None = None
    """The sandbox breaks while this command runs and stays broken."""


def result(stdout: str = "", *, exit_code: int = 0, stderr: str = "") -> ExecResult:
    """How a quick command ended."""
    return ExecResult(exit_code, stdout.encode(), stderr.encode(), timed_out=False, truncated=False, wall_s=0.0)


def timeout_result(timeout_s: float) -> ExecResult:
    """How a command ended that ran into its deadline."""
    return ExecResult(None, b"", b"", timed_out=True, truncated=False, wall_s=timeout_s)


def respond_with_files(command: str, files: dict[str, bytes]) -> ExecResult:
    """Understands `cat PATH`, `echo TEXT` and `echo TEXT > PATH`; anything else is not found."""
    if match := re.fullmatch(r"cat (\S+)", command):
        if match[1] in files:
            return result(files[match[1]].decode(errors="replace"))
        return result(exit_code=1, stderr=f"cat: {match[1]}: No such file or directory\n")
    if match := re.fullmatch(r"echo ([^>]*?)\s*(?:>\s*(\S+))?", command):
        if match[2] is None:
            return result(f"{match[1]}\n")
        files[match[2]] = f"{match[1]}\n".encode()
        return result()
    return result(exit_code=127, stderr=f"bash: line 1: {command.split(' ')[0]}: command not found\n")


class FakeSandbox:
    """Files in a dict. Commands are answered from the script first, then by `respond`."""

    def __init__(self, spec: SandboxSpec, script: Sequence[ExecResult], respond: Respond, faults: Faults):
        self.files = dict(spec.files)
        self.commands: list[str] = []
        """What was asked so far."""
        self._script = list(script)
        self._respond = respond
        self._faults = faults
        self._unusable: str | None = None

    async def exec(
        self, command: str, *, timeout_s: float, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> ExecResult:
        self._check_usable()
        number = len(self.commands)
        self.commands.append(command)
        if number == self._faults.hang_at:
            await asyncio.get_running_loop().create_future()
        if number == self._faults.break_at:
            self._unusable = "the fake sandbox broke, as it was told to"
        await asyncio.sleep(0)
        self._check_usable()
        return self._script.pop(0) if self._script else self._respond(command, self.files)

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        self._check_usable()
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path][:max_bytes]

    async def write(self, path: str, content: bytes) -> None:
        self._check_usable()
        self.files[path] = content

    async def list_files(self) -> Sequence[str]:
        self._check_usable()
        return sorted(self.files)

    async def stop(self) -> None:
        self._unusable = self._unusable or "the sandbox was stopped"

    def _check_usable(self) -> None:
        if self._unusable:
            raise SandboxError(self._unusable)


class FakeBackend:
    """Makes FakeSandboxes. `sandboxes` keeps them all, in order, also after they stopped."""

    def __init__(
        self, script: Sequence[ExecResult] = (), respond: Respond = respond_with_files, faults: Faults = Faults()
    ):
        self.sandboxes: list[FakeSandbox] = []
        self._script = script
        self._respond = respond
        self._faults = faults
        self._start_failures = faults.start_failures

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(isolation="none", network_none=True, forward_sockets=False)

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[FakeSandbox]:
        if self._start_failures:
            self._start_failures -= 1
            raise SandboxError("the fake sandbox could not be made, as it was told to")
        sandbox = FakeSandbox(spec, self._script, self._respond, self._faults)
        self.sandboxes.append(sandbox)
        try:
            yield sandbox
        finally:
            await sandbox.stop()

    async def stop(self) -> None:
        for sandbox in self.sandboxes:
            await sandbox.stop()
