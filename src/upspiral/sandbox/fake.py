"""A sandbox in memory that runs nothing: for tests of what happens around sandboxes, failures above all."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import random
import re
import tarfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from upspiral.errors import DeadlineError, SandboxError, SandboxGoneError
from upspiral.sandbox.base import (
    HOST_IMAGE,
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
    """What goes wrong. Commands of a sandbox are numbered from 0 as they are delivered to it."""

    start_failures: int = 0
    """So many sandboxes, the first ones, cannot be made."""
    start_failure_rate: float = 0.0
    """So many of the others cannot, by chance."""
    seed: int = 0
    """Of chance."""
    start_s: float = 0.0
    """How long it takes to make one, or to fail at it."""
    command_s: float = 0.0
    """How long each command takes; one that has less time runs into its deadline."""
    stop_s: float = 0.0
    """How long it takes to stop one."""
    hang_at: int | None = None
    """This command does not return before the sandbox is stopped, its deadline notwithstanding."""
    break_at: int | None = None
    """The sandbox breaks while this command runs and stays broken."""
    gone_at: int | None = None
    """The sandbox is stopped by somebody else before this command runs."""
    drop_at: int | None = None
    """This command is run, but the connection is lost before its result arrives; another one is made for the next."""
    repeat_at: int | None = None
    """This command is delivered twice, as by a retry of the transport. Only an op_id keeps it from running twice."""


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
    `respond`. Modes, ports and limits are no concern of it."""

    def __init__(
        self,
        spec: SandboxSpec,
        script: Sequence[ExecResult] = (),
        respond: Respond = respond_with_files,
        faults: Faults = Faults(),
        snapshots: dict[str, Mapping[str, bytes]] | None = None,
    ):
        self.id = f"fake-{next(_NUMBERS)}"
        self.spec = spec
        self._snapshots = snapshots if snapshots is not None else {}
        image = self._files_of(spec.image) if isinstance(spec.image, Snapshot) else {}
        self._before = {**image, **{_relative(path): content for path, content in spec.files.items()}}
        self.files = dict(self._before)
        self.commands: list[str] = []
        """What was run so far."""
        self.is_stopped = False
        self.forks: list[FakeSandbox] = []
        self._ended = asyncio.Event()
        self._script = list(script)
        self._respond = respond
        self._faults = faults
        self._unusable: SandboxError | None = None
        self._operations: dict[str, asyncio.Future[ExecResult]] = {}

    async def exec(self, command: str | Command, *, timeout_s: float) -> ExecResult:
        command = Command(command) if isinstance(command, str) else command
        number = len(self.commands)
        if number == self._faults.gone_at:
            self._unusable = SandboxGoneError(f"sandbox {self.id} was stopped by somebody else, as it was told to be")
        done = await self._deliver(command, timeout_s)
        if number == self._faults.repeat_at:
            done = await self._deliver(command, timeout_s)
        if number == self._faults.drop_at and number < len(self.commands):
            raise SandboxError("the connection to the fake sandbox was lost, as it was told to be")
        return done

    async def _deliver(self, command: Command, timeout_s: float) -> ExecResult:
        self._check_usable()
        if not command.op_id:
            return await self._run(command.script, timeout_s)
        if command.op_id not in self._operations:
            operation = asyncio.ensure_future(self._run(command.script, timeout_s))
            operation.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may be nobody's by then
            self._operations[command.op_id] = operation
        return await asyncio.shield(self._operations[command.op_id])

    async def _run(self, script: str, timeout_s: float) -> ExecResult:
        number = len(self.commands)
        self.commands.append(script)
        if number == self._faults.hang_at:
            await self._ended.wait()
        if number == self._faults.break_at:
            self._unusable = SandboxError("the fake sandbox broke, as it was told to")
        await asyncio.sleep(min(self._faults.command_s, timeout_s))
        self._check_usable()
        if self._faults.command_s > timeout_s:
            return timeout_result(timeout_s)
        return self._script.pop(0) if self._script else self._respond(script, self.files)

    async def spawn(self, command: str | Command) -> Process:
        return FakeProcess(await self.exec(command, timeout_s=60.0))

    async def shell(self) -> Shell:
        self._check_usable()
        return FakeShell(self)

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
        return sorted(self._below(path))

    async def upload(self, archive: bytes, path: str = WORKSPACE) -> None:
        self._check_usable()
        folder = _relative(path)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                if content := tar.extractfile(member):
                    self.files[_relative(f"{folder}/{member.name.removeprefix('./')}")] = content.read()

    async def download(self, path: str = WORKSPACE, *, max_bytes: int = 1 << 28) -> bytes:
        self._check_usable()
        archive = _archive_of(self._below(path))
        if len(archive) > max_bytes:
            raise OSError(f"{path}: as a tar it is larger than {max_bytes} bytes")
        return archive

    async def diff(self) -> Diff:
        self._check_usable()
        changed = {name: content for name, content in self.files.items() if self._before.get(name) != content}
        archive = _archive_of({f"{WORKSPACE[1:]}/{name}": content for name, content in changed.items()})
        return Diff(archive, [f"{WORKSPACE}/{name}" for name in self._before if name not in self.files])

    async def snapshot(self) -> Snapshot:
        self._check_usable()
        snapshot = Snapshot(f"fake-snapshot-{next(_NUMBERS)}", "copied")
        self._snapshots[snapshot.id] = dict(self.files)
        return snapshot

    async def fork(self, count: int = 1) -> Sequence[FakeSandbox]:
        self._check_usable()
        spec = replace(self.spec, image=HOST_IMAGE, files=self.files)
        made = [FakeSandbox(spec, self._script, self._respond, self._faults, self._snapshots) for _ in range(count)]
        self.forks += made
        return made

    async def restore(self, snapshot: Snapshot) -> None:
        self._check_usable()
        self.files = dict(self._files_of(snapshot))

    async def connect(self, port: int) -> ByteStream:
        self._check_usable()
        raise ConnectionRefusedError(f"nothing listens on port {port} of the fake sandbox")

    async def stop(self) -> None:
        if not self.is_stopped:
            await asyncio.sleep(self._faults.stop_s)
        self.is_stopped = True
        self._unusable = self._unusable or SandboxGoneError(f"sandbox {self.id} was stopped")
        self._ended.set()

    def _below(self, path: str) -> dict[str, bytes]:
        folder = _relative(path)
        start = f"{folder}/" if folder else ""
        return {name[len(start) :]: content for name, content in self.files.items() if name.startswith(start)}

    def _files_of(self, snapshot: Snapshot) -> Mapping[str, bytes]:
        if snapshot.id not in self._snapshots:
            raise SandboxError(
                f"there is no snapshot {snapshot.id!r} in the fake backend; it was dropped, or is another's"
            )
        return self._snapshots[snapshot.id]

    def _check_usable(self) -> None:
        if self._unusable:
            raise self._unusable


class FakeShell:
    """Satisfies Shell. Remembers nothing from one command to the next."""

    restored: Literal["new", "replayed", "live"] = "new"

    def __init__(self, sandbox: FakeSandbox):
        self._sandbox = sandbox

    async def run(self, command: str, *, timeout_s: float) -> ExecResult:
        return await self._sandbox.exec(command, timeout_s=timeout_s)

    async def close(self) -> None:
        return


class FakeProcess:
    """Satisfies Process. It has ended when it begins."""

    def __init__(self, done: ExecResult):
        self._done = done

    async def output(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes]]:
        if self._done.stdout:
            yield "stdout", self._done.stdout
        if self._done.stderr:
            yield "stderr", self._done.stderr

    async def write(self, content: bytes) -> None:
        raise BrokenPipeError("the program has ended")

    async def close_stdin(self) -> None:
        return

    async def kill(self, signal: int = 9) -> None:
        return

    async def wait(self, *, timeout_s: float) -> ExecResult:
        if self._done.timed_out:
            raise DeadlineError(f"the program did not end within {timeout_s:g} s; it runs on")
        return replace(self._done, stdout=b"", stderr=b"")


def _relative(path: str) -> str:
    inside = path[len(WORKSPACE) :] if path == WORKSPACE or path.startswith(f"{WORKSPACE}/") else path
    return inside.strip("/")


def _archive_of(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


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
        self._chance = random.Random(faults.seed)
        self._snapshots: dict[str, Mapping[str, bytes]] = {}

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            isolation="none", untrusted=False, network_none=True, forward_sockets=False, snapshot=True, connect=True
        )

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[FakeSandbox]:
        self.capabilities.check(spec, backend="fake")
        await asyncio.sleep(self._faults.start_s)
        self._start_failures -= 1
        if self._start_failures >= 0 or self._chance.random() < self._faults.start_failure_rate:
            raise SandboxError("the fake sandbox could not be made, as it was told to")
        sandbox = FakeSandbox(spec, self._script, self._respond, self._faults, self._snapshots)
        self.sandboxes.append(sandbox)
        try:
            yield sandbox
        finally:
            await sandbox.stop()

    async def drop(self, snapshot: Snapshot) -> None:
        self._snapshots.pop(snapshot.id, None)

    async def stop(self) -> None:
        living = list(self.sandboxes)
        while living:
            sandbox = living.pop(0)
            living += sandbox.forks
            await sandbox.stop()
