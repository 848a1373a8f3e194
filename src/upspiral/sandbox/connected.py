"""A sandbox behind a connection to its agent: all of `Sandbox` that a wire can do.

Backends derive from `ConnectedSandbox`: they say how it ends (`_dispose`) and what else it can do.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from upspiral.errors import CapabilityError, DeadlineError, SandboxError, SandboxGoneError
from upspiral.sandbox.base import (
    WORKSPACE,
    ByteStream,
    Command,
    Diff,
    ExecResult,
    Limits,
    Sandbox,
    SandboxSpec,
    Snapshot,
)
from upspiral.sandbox.connection import Call, Connection, Ended
from upspiral.sandbox.environment import check_environment, is_plain
from upspiral.sandbox.inside import frames
from upspiral.sandbox.inside.settings import Settings

GRACE_S = 15.0
"""So long after a command's deadline its agent has to say how it ended."""
_REPLAY_TIMEOUT_S = 60.0
"""Of one command of a shell that is made again."""
_MAX_LIST_BYTES = 64 << 20
_FILE_ERRORS = {
    error.__name__: error
    for error in (OSError, FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError,
                  ConnectionRefusedError, BlockingIOError)
}  # fmt: skip
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def settings_for(spec: SandboxSpec, workspace: str = WORKSPACE) -> Settings:
    """What an agent is told of a spec. Backends replace what they know better, rlimits that cgroups stand for first."""
    limits, mib = spec.limits, 1 << 20
    memory = "AS" if limits.memory_counts == "mapped" else "DATA"
    rlimits = {memory: limits.memory_mb * mib, "FSIZE": limits.file_mb * mib, "NPROC": limits.processes}
    rlimits |= {"CPU": limits.cpu_s, "NOFILE": limits.open_files, "CORE": 0}
    return Settings(
        workspace=workspace,
        env={"PATH": _PATH, "HOME": workspace, "LANG": "C.UTF-8", "TMPDIR": "/tmp", **spec.env},
        rlimits=rlimits,
        output_bytes=limits.output_bytes,
        forward_ports=tuple(spec.forward_sockets),
    )


class ConnectedSandbox:
    """Satisfies Sandbox. Lives until `stop`, the end of its lifetime or of its connection."""

    def __init__(self, identity: str, connection: Connection, limits: Limits):
        self._id = identity
        self._connection = connection
        self._limits = limits
        self._shells: list[ConnectedShell] = []
        self._inherited: Sequence[Sequence[str]] = ()
        """In a fork: the commands of shells that `shell` gives out first."""
        self._stopping: asyncio.Future[None] | None = None
        self._lifetime = asyncio.get_running_loop().call_later(limits.lifetime_s, self._expire)

    @property
    def id(self) -> str:
        return self._id

    @property
    def connection(self) -> Connection:
        """To its agent: another one once the sandbox was sealed."""
        return self._connection

    async def lay_out(self, files: Mapping[str, bytes]) -> None:
        """Writes the files of a spec, all of them at once. Raises SandboxError when one cannot be written."""
        try:
            async with asyncio.TaskGroup() as writes:
                for path, content in files.items():
                    writes.create_task(self.write(path, content))
        except ExceptionGroup as errors:
            first = errors.exceptions[0]  # the others were cancelled, or say the same
            if isinstance(first, (OSError, ValueError)):
                raise SandboxError(f"the spec's files could not be laid out: {first}") from None
            raise first from None

    async def exec(self, command: str | Command, *, timeout_s: float) -> ExecResult:
        command = _checked(command)
        limit = self._limits.output_bytes if command.output_bytes is None else command.output_bytes
        script = _script(command)
        request = {**_request("exec", command, script), "timeout_s": timeout_s, "op_id": command.op_id}
        request["output_bytes"] = limit
        limits = {frames.DATA: limit, frames.ERRORS: limit}
        call = self._connection.call(request, script + command.stdin, limits)
        return _result(await call.result(silence_s=timeout_s + GRACE_S), call)

    async def spawn(self, command: str | Command) -> ConnectedProcess:
        command = _checked(command)
        script = _script(command)
        call = self._connection.call(_request("spawn", command, script), None)
        try:
            with call.bounded(len(script)):
                await call.send(script)
            await call.start()
        except BaseException:
            await call.cancel()
            raise
        if command.stdin:
            self._connection.feed(call, command.stdin)
        return ConnectedProcess(call, stdin_closed=bool(command.stdin))

    async def shell(self) -> ConnectedShell:
        """In a fork first one for each that was open, in the order in which these were opened: the commands that had
        been run in it are run again, on the files that the fork began with."""
        call = self._connection.call({"do": "shell", "env": {}, "cwd": WORKSPACE})
        await call.start()
        if call.ended.done():
            _raise_broken(call.ended.result())
        shell = ConnectedShell(self._connection, call, self._limits.output_bytes)
        if self._inherited:
            commands, *self._inherited = self._inherited
            try:
                await shell.replay(commands)
            except BaseException:
                self._inherited = [commands, *self._inherited]
                await shell.close()
                raise
        self._shells = [*(each for each in self._shells if each.is_open), shell]
        return shell

    def shells_to_inherit(self) -> Sequence[Sequence[str]]:
        """The commands of each shell that is open, for forks."""
        return [*(tuple(shell.commands) for shell in self._shells if shell.is_open), *self._inherited]

    def inherit_shells(self, commands: Sequence[Sequence[str]]) -> None:
        """In a fork of a sandbox that had these; in one that was put back to a snapshot there are none."""
        self._shells, self._inherited = [], commands

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        call = self._connection.call(
            {"do": "read", "path": _path(path), "max_bytes": max_bytes}, limits={frames.DATA: max_bytes}
        )
        _check(await call.result(), path)
        return bytes(call.kept[frames.DATA])

    async def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        call = self._connection.call({"do": "write", "path": _path(path), "mode": mode}, content)
        _check(await call.result(), path)

    async def list_files(self, path: str = WORKSPACE) -> Sequence[str]:
        names = await self._output_of("list", path, _MAX_LIST_BYTES, "its list")
        return sorted(os.fsdecode(name) for name in names.split(b"\0") if name)

    async def upload(self, archive: bytes, path: str = WORKSPACE) -> None:
        call = self._connection.call({"do": "unpack", "path": _path(path)}, archive)
        _check(await call.result(), path)

    async def download(self, path: str = WORKSPACE, *, max_bytes: int = 1 << 28) -> bytes:
        return await self._output_of("pack", path, max_bytes, "as a tar it")

    async def _output_of(self, do: str, path: str, max_bytes: int, what: str) -> bytes:
        """Of an operation on a folder, whose length depends on what lies there. Raises OSError when it is too long."""
        call = self._connection.call({"do": do, "path": _path(path)})
        output = bytearray()
        try:
            with call.bounded(max_bytes):
                while received := await call.receive():
                    output += received[1]
                    if len(output) > max_bytes:
                        raise OSError(f"{path}: {what} is larger than {max_bytes} bytes")
        except BaseException:
            await call.cancel()
            raise
        _check(await call.result(), path)
        return bytes(output)

    async def connect(self, port: int) -> ByteStream:
        if not 0 < port < 1 << 16:
            raise ValueError(f"{port} is no port; give one from 1 to 65535")
        call = self._connection.call({"do": "connect", "port": port}, None)
        await call.start()
        if call.ended.done():
            _check(call.ended.result(), f"port {port} inside")
        return ConnectedStream(call)

    async def diff(self) -> Diff:
        raise self._cannot("tell what was written")

    async def snapshot(self) -> Snapshot:
        raise self._cannot("take a snapshot")

    def _check_live(self) -> None:
        """Before its backend is asked to do something about it."""
        if self._connection.error:
            raise type(self._connection.error)(*self._connection.error.args)

    async def fork(self, count: int = 1) -> Sequence[Sandbox]:
        raise self._cannot("fork")

    async def restore(self, snapshot: Snapshot) -> None:
        raise self._cannot("restore a snapshot")

    async def stop(self) -> None:
        await self._end(SandboxGoneError("the sandbox was stopped"))

    async def _dispose(self) -> None:
        """Removes what is left of it when its connection has ended. Called once."""

    async def _end(self, reason: SandboxError) -> None:
        if self._stopping is None:
            self._lifetime.cancel()
            self._stopping = asyncio.ensure_future(self._close(reason))
        await asyncio.shield(self._stopping)

    async def _close(self, reason: SandboxError) -> None:
        await self._connection.close(reason)
        await self._dispose()

    def _expire(self) -> None:
        lifetime = f"{self._limits.lifetime_s:g} s"
        self._expiry = asyncio.ensure_future(
            self._end(SandboxGoneError(f"the sandbox's lifetime of {lifetime} is over"))
        )

    def _cannot(self, what: str) -> CapabilityError:
        return CapabilityError(f"this sandbox cannot {what}; the namespace backend can")


class ConnectedProcess:
    """Satisfies Process."""

    def __init__(self, call: Call, *, stdin_closed: bool):
        self._call = call
        self._stdin_closed = stdin_closed

    async def output(self) -> AsyncIterator[tuple[Literal["stdout", "stderr"], bytes]]:
        while received := await self._call.receive():
            yield "stderr" if received[0] == frames.ERRORS else "stdout", received[1]

    async def write(self, content: bytes) -> None:
        if self._stdin_closed or self._call.input_closed or self._call.ended.done():
            raise BrokenPipeError("the program's stdin is closed")
        await self._call.send(content)

    async def close_stdin(self) -> None:
        if not self._stdin_closed:
            self._stdin_closed = True
            self._call.end()

    async def kill(self, signal: int = 9) -> None:
        if not 0 < signal <= 64:
            raise ValueError(f"{signal} is no signal; give one from 1 to 64")
        self._call.control(signal=signal)

    async def wait(self, *, timeout_s: float) -> ExecResult:
        done, _ = await asyncio.wait([self._call.ended], timeout=timeout_s)
        if not done:
            raise DeadlineError(f"the program did not end within {timeout_s:g} s; it runs on")
        return _result(self._call.ended.result(), self._call)


class ConnectedShell:
    """Satisfies Shell. `commands` are those that were run, for a fork to run them again."""

    restored: Literal["new", "replayed", "live"] = "new"

    def __init__(self, connection: Connection, call: Call, output_bytes: int):
        self.commands: list[str] = []
        self._connection = connection
        self._call = call
        self._limits = {frames.DATA: output_bytes, frames.ERRORS: output_bytes}
        self._turn = asyncio.Lock()

    async def run(self, command: str, *, timeout_s: float) -> ExecResult:
        async with self._turn:
            self.commands.append(command)
            script = _script(_checked(command))
            request = {"do": "run", "shell": self._call.number, "timeout_s": timeout_s}
            call = self._connection.call(request, script, self._limits)
            return _result(await call.result(silence_s=timeout_s + GRACE_S), call)

    async def replay(self, commands: Sequence[str]) -> None:
        for command in commands:
            await self.run(command, timeout_s=_REPLAY_TIMEOUT_S)
        self.restored = "replayed"

    @property
    def is_open(self) -> bool:
        return not self._call.ended.done()

    async def close(self) -> None:
        await self._call.cancel()


class ConnectedStream:
    """Satisfies ByteStream."""

    def __init__(self, call: Call):
        self._call = call

    async def read(self) -> bytes:
        received = await self._call.receive()
        return received[1] if received else b""

    async def write(self, content: bytes) -> None:
        if self._call.ended.done():
            self._call.ended.result()
            raise ConnectionResetError("the connection into the sandbox is closed")
        await self._call.send(content)

    async def close(self) -> None:
        await self._call.cancel()


def _checked(command: str | Command) -> Command:
    """Raises ValueError for what no process can be given."""
    command = Command(command) if isinstance(command, str) else command
    check_environment(command.env)
    if not is_plain(command.cwd):
        raise ValueError(f"cwd: {command.cwd!r} has a NUL or half of a surrogate pair in it")
    if command.output_bytes is not None and command.output_bytes < 0:
        raise ValueError(f"output_bytes: {command.output_bytes} is less than none; 0 keeps nothing")
    return command if "\0" not in command.script else replace(command, script=command.script.replace("\0", ""))


def _path(path: str) -> str:
    """Names that are no text travel as surrogates, as everywhere in Python."""
    if not path or not is_plain(path):
        raise ValueError(f"{path!r} is no path; it is empty, or has a NUL or half of a surrogate pair in it")
    return path


def _script(command: Command) -> bytes:
    """A model may write half a surrogate pair; bash then gets a question mark."""
    return command.script.encode(errors="replace")


def _request(do: str, command: Command, script: bytes) -> dict[str, object]:
    return {"do": do, "script_bytes": len(script), "env": dict(command.env), "cwd": command.cwd}


def _result(ended: Ended, call: Call) -> ExecResult:
    if ended.error:
        _raise_broken(ended)
    if ended.exit_code is not None and not 0 <= ended.exit_code <= 255:
        raise SandboxError(f"the sandbox's agent told of an exit code of {ended.exit_code}")
    stdout, stderr = (bytes(call.kept.get(kind, b"")) for kind in (frames.DATA, frames.ERRORS))
    fields = ("timed_out", "oom", "dropped_bytes", "wall_s", "cpu_s", "peak_mb")
    return ExecResult(ended.exit_code, stdout, stderr, **{name: getattr(ended, name) for name in fields})


def _check(ended: Ended, what: str) -> None:
    """Raises OSError for what cannot be done to a file or port, SandboxError for everything else that went wrong."""
    if ended.error in _FILE_ERRORS:
        raise _FILE_ERRORS[ended.error](f"{what}: {ended.message[:500]}")
    if ended.error:
        _raise_broken(ended)


def _raise_broken(ended: Ended) -> None:
    raise SandboxError(ended.message[:500] or f"the sandbox's agent says: {ended.error[:500]}")
