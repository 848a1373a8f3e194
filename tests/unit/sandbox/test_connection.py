"""The host's end of the wire against agents that lie, hang and die: whatever they send, the answer is SandboxError."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upspiral.errors import SandboxError, SandboxGoneError
from upspiral.sandbox.base import Limits
from upspiral.sandbox.connected import ConnectedSandbox
from upspiral.sandbox.connection import Connection
from upspiral.sandbox.inside import frames

LIMIT = 1000
TIMEOUT_S = 30.0


class Liar:
    """The agent's end, in the test's hands."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader = reader
        self._decoder = frames.Decoder()
        self._waiting: list[tuple[int, int, bytes]] = []
        self.writer = writer

    async def next(self) -> tuple[int, int, bytes]:
        while not self._waiting:
            received = await self._reader.read(65536)
            assert received, "the host closed the connection"
            self._waiting += self._decoder.feed(received)
        return self._waiting.pop(0)

    async def until(self, kind: int) -> tuple[int, bytes]:
        """The operation and body of the next frame of this kind."""
        while True:
            got, number, body = await self.next()
            if got == kind:
                return number, body

    def send(self, kind: int, number: int, body: bytes = b"") -> None:
        self.writer.write(frames.frame(kind, number, body))

    def result(self, number: int, **values: object) -> None:
        self.send(frames.RESULT, number, json.dumps(values).encode())


@asynccontextmanager
async def stage(forward: dict[int, str] | None = None) -> AsyncIterator[tuple[ConnectedSandbox, Liar]]:
    ours, theirs = socket.socketpair()
    connection = await Connection.over(ours, forward=forward)
    sandbox = ConnectedSandbox("test", connection, Limits(output_bytes=LIMIT))
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    try:
        yield sandbox, Liar(reader, writer)
    finally:
        await sandbox.stop()
        writer.close()


def run(check: Callable[[], Awaitable[None]]) -> None:
    async def body() -> None:
        await asyncio.wait_for(check(), TIMEOUT_S)

    asyncio.run(body())


LIES: dict[str, Callable[[Liar, int], object]] = {
    "a frame that is too long": lambda liar, n: liar.writer.write(frames.HEADER.pack(1 << 21, n, frames.DATA)),
    "a kind that is none": lambda liar, n: liar.send(99, n),
    "a kind of zero": lambda liar, n: liar.send(0, n),
    "an operation that nobody began": lambda liar, n: liar.send(frames.DATA, n + 1, b"x"),
    "more stdout than asked for": lambda liar, n: liar.send(frames.DATA, n, b"x" * (LIMIT + 1)),
    "more stderr, bit by bit": lambda liar, n: [liar.send(frames.ERRORS, n, b"x" * 100) for _ in range(11)],
    "no JSON": lambda liar, n: liar.send(frames.RESULT, n, b"{"),
    "JSON that is no object": lambda liar, n: liar.send(frames.RESULT, n, b"[1]"),
    "JSON nested deeply": lambda liar, n: liar.send(
        frames.RESULT, n, b'{"x":' + b"[" * 500_000 + b"]" * 500_000 + b"}"
    ),
    "an unknown field": lambda liar, n: liar.result(n, exit_code=0, reward=1.0),
    "an exit code that is text": lambda liar, n: liar.result(n, exit_code="0"),
    "an exit code out of range": lambda liar, n: liar.result(n, exit_code=-1),
    "an exit code far out of range": lambda liar, n: liar.result(n, exit_code=1 << 70),
    "a pickle": lambda liar, n: liar.send(frames.RESULT, n, b"\x80\x04\x95\x00."),
    "an error that is not ours": lambda liar, n: liar.result(n, error="SystemExit", message="x"),
    "an operation of its own": lambda liar, n: liar.send(frames.OPEN, frames.INSIDE, b'{"do":"forward","port":22}'),
    "an operation of another kind": lambda liar, n: liar.send(frames.OPEN, frames.INSIDE, b'{"do":"exec","port":80}'),
    "an operation of the host's number": lambda liar, n: liar.send(frames.OPEN, n + 9, b'{"do":"forward","port":80}'),
    "an ACK that is no number": lambda liar, n: liar.send(frames.ACK, n, b"x"),
    "complaints of a caller, who has none": lambda liar, n: (
        liar.send(frames.OPEN, frames.INSIDE, b'{"do":"forward","port":80}'),
        liar.send(frames.ERRORS, frames.INSIDE, b"x"),
    ),
    "text that is none": lambda liar, n: liar.send(frames.RESULT, n, b'{"error": "\xff"}'),
    "settings": lambda liar, n: liar.send(frames.SETTINGS, n, b"{}"),
    "the end": lambda liar, n: liar.writer.close(),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_lie_breaks_the_sandbox_and_nothing_else(lie: Callable[[Liar, int], object]) -> None:
    async def check() -> None:
        async with stage({80: "/no/such.sock"}) as (sandbox, liar):
            running = asyncio.create_task(sandbox.exec("true", timeout_s=TIMEOUT_S))
            number, _ = await liar.until(frames.OPEN)
            lie(liar, number)
            with pytest.raises(SandboxError):
                await running

    run(check)


def test_a_broken_protocol_ends_everything_on_the_connection_and_says_why() -> None:
    async def check() -> None:
        async with stage() as (sandbox, liar):
            running = [asyncio.create_task(sandbox.exec("true", timeout_s=TIMEOUT_S)) for _ in range(3)]
            await liar.until(frames.OPEN)
            liar.send(99, 1)
            for each in running:
                with pytest.raises(SandboxError, match="broke the protocol: a frame of kind 99"):
                    await each
            with pytest.raises(SandboxError, match="broke the protocol"):
                await sandbox.read("x")

    run(check)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.binary(max_size=60) | st.builds(frames.frame, st.integers(0, 12), st.integers(0, 3), st.binary(max_size=30)),
        max_size=8,
    )
)
def test_whatever_comes_there_is_an_answer(pieces: list[bytes]) -> None:
    async def check() -> None:
        async with stage() as (sandbox, liar):
            running = asyncio.create_task(sandbox.exec("true", timeout_s=TIMEOUT_S))
            await liar.until(frames.OPEN)
            for piece in pieces:
                liar.writer.write(piece)
            liar.writer.close()
            try:
                done = await running
            except SandboxError:
                return
            assert len(done.stdout) <= LIMIT and len(done.stderr) <= LIMIT

    run(check)


def test_frames_may_come_in_any_pieces() -> None:
    async def check() -> None:
        async with stage() as (sandbox, liar):
            running = asyncio.create_task(sandbox.exec("true", timeout_s=TIMEOUT_S))
            number, _ = await liar.until(frames.OPEN)
            whole = frames.frame(frames.DATA, number, b"out") + frames.frame(frames.ERRORS, number, b"err")
            whole += frames.frame(frames.RESULT, number, b'{"exit_code": 3, "dropped_bytes": 7, "cpu_s": 0.5}')
            for position in range(len(whole)):
                liar.writer.write(whole[position : position + 1])
                await liar.writer.drain()
                await asyncio.sleep(0)
            done = await running
            assert (done.exit_code, done.stdout, done.stderr, done.dropped_bytes) == (3, b"out", b"err", 7)

    run(check)


def test_an_agent_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upspiral.sandbox.connected.GRACE_S", 0.1)

    async def check() -> None:
        async with stage() as (sandbox, _):
            with pytest.raises(SandboxError, match=r"silent for 0\.3 s"):
                await sandbox.exec("true", timeout_s=0.2)
            with pytest.raises(SandboxError, match="silent"):
                await sandbox.read("x")

    run(check)


def test_cancelling_tells_the_agent_and_waits_for_it() -> None:
    async def check() -> None:
        async with stage() as (sandbox, liar):
            running = asyncio.create_task(sandbox.exec("true", timeout_s=TIMEOUT_S))
            number, _ = await liar.until(frames.OPEN)
            running.cancel()
            told = await liar.until(frames.CONTROL)
            assert told == (number, b'{"cancel": true}')
            await asyncio.sleep(0.05)
            assert not running.done()
            liar.result(number, error="cancelled")
            with pytest.raises(asyncio.CancelledError):
                await running

    run(check)


def test_stopping_is_told_apart_from_breaking() -> None:
    async def check() -> None:
        async with stage() as (sandbox, liar):
            running = asyncio.create_task(sandbox.exec("true", timeout_s=TIMEOUT_S))
            await liar.until(frames.OPEN)
            await sandbox.stop()
            with pytest.raises(SandboxGoneError):
                await running

    run(check)


def test_the_window_holds_both_ways() -> None:
    async def check() -> None:
        async with stage() as (sandbox, liar):
            process_task = asyncio.create_task(sandbox.spawn("cat"))
            number, _ = await liar.until(frames.OPEN)
            liar.send(frames.STARTED, number, b"{}")
            process = await process_task
            writing = asyncio.create_task(process.write(b"x" * (3 * frames.WINDOW_BYTES)))
            received = -len("cat")
            while received < frames.WINDOW_BYTES - len("cat"):
                received += len((await liar.until(frames.DATA))[1])
            await asyncio.sleep(0.05)
            assert not writing.done() and received == frames.WINDOW_BYTES - len("cat")
            liar.send(frames.ACK, number, frames.COUNT.pack(frames.WINDOW_BYTES))
            while received < 2 * frames.WINDOW_BYTES - len("cat"):
                received += len((await liar.until(frames.DATA))[1])
            writing.cancel()
            for _ in range(frames.WINDOW_BYTES // frames.CHUNK_BYTES):
                liar.send(frames.DATA, number, b"y" * frames.CHUNK_BYTES)
            output = process.output()
            assert (await anext(output))[1] == b"y" * frames.CHUNK_BYTES
            for _ in range(2):
                liar.send(frames.DATA, number, b"y" * frames.CHUNK_BYTES)
            with pytest.raises(SandboxError, match="more output than the window allows"):
                await process.wait(timeout_s=TIMEOUT_S)

    run(check)


def test_output_that_waits_is_not_kept_in_crumbs() -> None:
    """Each of which takes a hundred times its own room."""

    async def check() -> None:
        async with stage() as (sandbox, liar):
            spawning = asyncio.create_task(sandbox.spawn("x"))
            number, _ = await liar.until(frames.OPEN)
            liar.send(frames.STARTED, number, b"{}")
            output = (await spawning).output()
            for _ in range(3000):
                liar.send(frames.DATA, number, b"x")
            liar.result(number, exit_code=0)
            await asyncio.sleep(0.1)
            assert [len(content) async for _, content in output] == [1024, 1024, 952]

    run(check)


def test_a_program_that_is_cancelled_before_it_began_is_given_up() -> None:
    async def check() -> None:
        async with stage() as (sandbox, liar):
            spawning = asyncio.create_task(sandbox.spawn("x" * (2 * frames.WINDOW_BYTES)))
            number, _ = await liar.until(frames.DATA)
            spawning.cancel()
            assert await liar.until(frames.CONTROL) == (number, b'{"cancel": true}')
            liar.result(number, error="cancelled")
            with pytest.raises(asyncio.CancelledError):
                await spawning
            assert sandbox.connection.is_idle

    run(check)


def test_numbers_that_are_out_of_range_are_the_caller_s_mistake() -> None:
    async def check() -> None:
        async with stage() as (sandbox, liar):
            spawning = asyncio.create_task(sandbox.spawn("x"))
            number, _ = await liar.until(frames.OPEN)
            liar.send(frames.STARTED, number, b"{}")
            process = await spawning
            for attempt in (process.kill(0), process.kill(65), sandbox.connect(0), sandbox.connect(1 << 16)):
                with pytest.raises(ValueError):
                    await attempt

    run(check)


def test_a_flood_of_callers_is_refused_and_one_that_reads_nothing_breaks() -> None:
    async def check() -> None:
        async with stage({80: "/no/such.sock"}) as (sandbox, liar):
            for number in range(2000):
                liar.send(frames.OPEN, frames.INSIDE + number, b'{"do":"forward","port":80}')
            answers = [await liar.until(frames.RESULT) for _ in range(2000)]
            assert all(json.loads(body)["error"] == "ConnectionRefusedError" for _, body in answers)
            running = asyncio.create_task(sandbox.exec("true", timeout_s=TIMEOUT_S))
            number, _ = await liar.until(frames.OPEN)
            liar.result(number, exit_code=0)
            assert (await running).exit_code == 0

    run(check)


@pytest.mark.parametrize("how", ["it dies", "it refuses"])
def test_files_that_cannot_be_laid_out_are_an_error_of_the_sandbox(how: str) -> None:
    """And no group of errors, which nobody who looks for a SandboxError would see."""

    async def run() -> None:
        async with stage() as (sandbox, liar):
            laying = asyncio.create_task(sandbox.lay_out({"a": b"1", "b": b"2", "c": b"3"}))
            if how == "it dies":
                liar.writer.close()
            else:
                for _ in range(3):
                    number, _ = await liar.until(frames.OPEN)
                    liar.result(number, error="PermissionError", message="not here")
            with pytest.raises(SandboxError):
                await asyncio.wait_for(laying, TIMEOUT_S)

    asyncio.run(run())
