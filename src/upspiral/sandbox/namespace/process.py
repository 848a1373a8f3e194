"""Runs one program on the host with a deadline and a bound on what is kept of its output."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_CHUNK_BYTES = 64 * 1024
_AFTER_KILL_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Outcome:
    return_code: int | None
    """None when it was killed at the deadline; negative when a signal ended the program."""
    stdout: bytes
    stderr: bytes
    dropped_bytes: int
    wall_s: float


class _Kept:
    """The head of a stream. The rest is read, so that the writer goes on, and dropped."""

    def __init__(self, limit: int):
        self.content = bytearray()
        self.dropped_bytes = 0
        self._limit = limit

    async def fill(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(_CHUNK_BYTES):
            room = self._limit - len(self.content)
            self.content += chunk[:room]
            self.dropped_bytes += max(0, len(chunk) - room)


@dataclass(frozen=True, slots=True)
class Program:
    """What to run. The program gets an empty environment and, besides the standard ones, only `descriptors`."""

    argv: Sequence[str]
    descriptors: Sequence[int] = ()
    stdin: bytes = b""


async def run(
    program: Program, *, timeout_s: float, output_bytes: int, started: Callable[[], None] = lambda: None
) -> Outcome:
    """Runs to the end or to the deadline, whichever is first. Cancelling kills the program, too.

    `started` is called once the program has its own copies of the descriptors. Raises OSError when it cannot start.
    """
    begin = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *program.argv,
        stdin=asyncio.subprocess.PIPE if program.stdin else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=program.descriptors,
        start_new_session=True,
        env={},
    )
    started()
    stdout, stderr = _Kept(output_bytes), _Kept(output_bytes)
    timed_out = False
    ended = asyncio.ensure_future(_to_the_end(process, stdout, stderr, program.stdin))
    try:
        await asyncio.wait_for(asyncio.shield(ended), timeout_s)
    except TimeoutError:
        timed_out = True
    finally:
        await _kill(process, ended)
    return Outcome(
        return_code=None if timed_out else process.returncode,
        stdout=bytes(stdout.content),
        stderr=bytes(stderr.content),
        dropped_bytes=stdout.dropped_bytes + stderr.dropped_bytes,
        wall_s=time.monotonic() - begin,
    )


async def _to_the_end(process: asyncio.subprocess.Process, stdout: _Kept, stderr: _Kept, stdin: bytes) -> None:
    assert process.stdout is not None and process.stderr is not None
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stdout.fill(process.stdout))
        tasks.create_task(stderr.fill(process.stderr))
        if process.stdin is not None:
            tasks.create_task(_feed(process.stdin, stdin))
        tasks.create_task(process.wait())


async def _feed(stream: asyncio.StreamWriter, content: bytes) -> None:
    try:
        stream.write(content)
        await stream.drain()
        stream.close()
        await stream.wait_closed()
    except (BrokenPipeError, ConnectionResetError):
        pass  # a program need not read its input


async def _kill(process: asyncio.subprocess.Process, ended: asyncio.Future[None]) -> None:
    if process.returncode is None:
        process.kill()
    if not ended.done():
        # The pipes close once everything inside is dead. Should something survive all the same, it does not hold us.
        await asyncio.wait([ended], timeout=_AFTER_KILL_TIMEOUT_S)
        ended.cancel()
