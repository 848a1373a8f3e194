"""A sandbox in memory that runs nothing: for tests of what happens around sandboxes, failures above all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from upspiral.errors import CapabilityError, SandboxError, SandboxGoneError
from upspiral.sandbox.base import (
    WORKSPACE,
    ByteStream,
    Capabilities,
    Command,
    Diff,
    ExecResult,
    Process,
    SandboxSpec,
    Shell,
    Snapshot,
)

Respond = Callable[[str, dict[str, bytes]], ExecResult]
"""From a command and the files, which it may change, to the result."""
_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong. Commands of a sandbox are numbered from 0."""

    start_failures: int = 0
    """So many sandboxes, the first ones, cannot be made."""
    start_s: float = 0.0
    """How long it takes to make one, or to fail at it."""
    stop_s: float = 0.0
    """How long it takes to stop one."""
    hang_at: int | None = None
    """This command never returns, its deadline notwithstanding."""
    break_at: int | None = None
    """The sandbox breaks while this command runs and stays broken."""


def result(stdout: str = "", *, exit_code: int = 0, stderr: str = "") -> ExecResult:
    """How a quick command ended."""
    return ExecResult(exit_code, stdout.encode(), stderr.encode())


def timeout_result(timeout_s: float) -> ExecResult:
    """How a command ended that ran into its deadline."""
    return ExecResult(None, b"", b"", timed_out=True, wall_s=timeout_s)


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
    """Files in a dict, by path relative to the workspace. Commands are answered from the script first, then by
    `respond`."""

    def __init__(self, spec: SandboxSpec, script: Sequence[ExecResult], respond: Respond, faults: Faults):
        self.id = f"fake-{next(_NUMBERS)}"
        self.spec = spec
        self.files = dict(spec.files)
        self.commands: list[str] = []
        """What was asked so far."""
        self.is_stopped = False
        self._script = list(script)
        self._respond = respond
        self._faults = faults
        self._broken: str | None = None
        self._operations: dict[str, asyncio.Future[ExecResult]] = {}

    async def exec(self, command: str | Command, *, timeout_s: float) -> ExecResult:
        del timeout_s
        self._check_usable()
        if not isinstance(command, Command) or not command.op_id:
            return await self._exec(command if isinstance(command, str) else command.script)
        if command.op_id not in self._operations:
            self._operations[command.op_id] = asyncio.ensure_future(self._exec(command.script))
        return await asyncio.shield(self._operations[command.op_id])

    async def _exec(self, script: str) -> ExecResult:
        number = len(self.commands)
        self.commands.append(script)
        if number == self._faults.hang_at:
            await asyncio.get_running_loop().create_future()
        if number == self._faults.break_at:
            self._broken = "the fake sandbox broke, as it was told to"
        await asyncio.sleep(0)
        self._check_usable()
        return self._script.pop(0) if self._script else self._respond(script, self.files)

    async def spawn(self, command: str | Command) -> Process:
        raise CapabilityError(f"the fake sandbox runs nothing, so not {command!r}")

    async def shell(self) -> Shell:
        raise CapabilityError("the fake sandbox has no shell")

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        self._check_usable()
        if _relative(path) not in self.files:
            raise FileNotFoundError(path)
        return self.files[_relative(path)][:max_bytes]

    async def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        del mode
        self._check_usable()
        self.files[_relative(path)] = content

    async def list_files(self, path: str = WORKSPACE) -> Sequence[str]:
        self._check_usable()
        folder = _relative(path)
        below = [name.removeprefix(f"{folder}/") for name in self.files if not folder or name.startswith(f"{folder}/")]
        return sorted(below)

    async def upload(self, archive: bytes, path: str = WORKSPACE) -> None:
        raise CapabilityError("the fake sandbox takes no archives")

    async def download(self, path: str = WORKSPACE, *, max_bytes: int = 1 << 28) -> bytes:
        raise CapabilityError("the fake sandbox gives no archives")

    async def diff(self) -> Diff:
        raise CapabilityError("the fake sandbox gives no archives")

    async def snapshot(self) -> Snapshot:
        raise CapabilityError("the fake sandbox was made without a backend that keeps snapshots")

    async def fork(self, count: int = 1) -> Sequence[FakeSandbox]:
        self._check_usable()
        spec = replace(self.spec, files=self.files)
        return [FakeSandbox(spec, self._script, self._respond, self._faults) for _ in range(count)]

    async def restore(self, snapshot: Snapshot) -> None:
        raise CapabilityError("the fake sandbox was made without a backend that keeps snapshots")

    async def connect(self, port: int) -> ByteStream:
        self._check_usable()
        raise ConnectionRefusedError(f"nothing listens on port {port} of the fake sandbox")

    async def stop(self) -> None:
        if not self.is_stopped:
            await asyncio.sleep(self._faults.stop_s)
        self.is_stopped = True

    def _check_usable(self) -> None:
        if self._broken:
            raise SandboxError(self._broken)
        if self.is_stopped:
            raise SandboxGoneError(f"sandbox {self.id} was stopped")


def _relative(path: str) -> str:
    return path.removeprefix(WORKSPACE).strip("/")


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
        return Capabilities(isolation="none", untrusted=False, network_none=True, forward_sockets=False)

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[FakeSandbox]:
        self.capabilities.check(spec, backend="fake")
        await asyncio.sleep(self._faults.start_s)
        if self._start_failures:
            self._start_failures -= 1
            raise SandboxError("the fake sandbox could not be made, as it was told to")
        sandbox = FakeSandbox(spec, self._script, self._respond, self._faults)
        self.sandboxes.append(sandbox)
        try:
            yield sandbox
        finally:
            await sandbox.stop()

    async def drop(self, snapshot: Snapshot) -> None:
        del snapshot

    async def stop(self) -> None:
        for sandbox in self.sandboxes:
            await sandbox.stop()
