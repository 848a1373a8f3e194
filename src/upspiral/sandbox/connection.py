"""The host's end of the wire to an agent inside a sandbox (`inside/frames.py` tells the frames).

What comes from inside is untrusted. A frame, a number, a message or an amount of data that was not asked for breaks the
connection: every operation under way and every later one raises SandboxError, which names what was wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import msgspec

from upspiral.errors import SandboxError
from upspiral.sandbox.inside import frames
from upspiral.sandbox.inside.settings import Settings

SILENCE_S = 60.0
"""An agent that owes an answer and says nothing for so long is broken."""
_CANCEL_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 5.0
_SLOWEST_BYTES_PER_S = 64 << 10
"""What an operation takes in and gives out has that time, beside its own."""
_MAX_STRAY_BYTES = 512 << 20
"""Of operations that were given up, on their way at a time."""
_SMALL_BYTES = 1024
"""Output that waits for its reader is kept in no smaller pieces, for what a piece costs beside its bytes."""
_SHORTEST_WAIT_S = 0.02
"""While the clock of a connection stands still, whoever waits for it looks again and again."""
_MAX_CALLERS = 512
"""Of forwarded ports, at a time. Further ones are refused."""


class Ended(msgspec.Struct, forbid_unknown_fields=True):
    """A RESULT. `error` is the name of an exception, or a sentence."""

    error: str = ""
    message: str = ""
    exit_code: int | None = None
    timed_out: bool = False
    oom: bool = False
    dropped_bytes: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """An OPEN from inside: a caller of a forwarded port."""

    do: str
    port: int


class Notice(msgspec.Struct, forbid_unknown_fields=True):
    """A CONTROL from inside."""

    cancel: bool = False
    stdin: str = ""


_ended, _asked, _notice = msgspec.json.Decoder(Ended), msgspec.json.Decoder(Asked), msgspec.json.Decoder(Notice)


class BrokenRuleError(Exception):
    """The agent did what it must not."""


class Party(Protocol):
    """Whom the frames of an operation are for."""

    number: int

    def take(self, kind: int, body: bytes) -> None:
        """Raises BrokenRuleError for a frame that must not come."""
        ...

    def fail(self, error: SandboxError) -> None:
        """The connection broke."""
        ...

    def wake(self) -> None:
        """There is room to write again."""
        ...


class Call:
    """One operation. `ended` is the future of its result, `started` of its being under way."""

    def __init__(self, connection: Connection, limits: Mapping[int, int] | None, number: int = 0):
        """`limits` are the most bytes of DATA and of ERRORS that may come, all of them kept in `kept`; None: as many as
        there are, but no more than a window ahead of `receive`."""
        loop = asyncio.get_running_loop()
        self.number = number
        self.started: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[Ended] = loop.create_future()
        self.kept = {kind: bytearray() for kind in limits or ()}
        self.input_closed = False
        """The program does not read its stdin any more."""
        self._connection = connection
        self._limits = limits
        self._arrived: deque[tuple[int, bytes]] = deque()
        self._unused = 0
        self._used = 0
        self._output_ended = False
        self._credit = frames.WINDOW_BYTES
        self._changed: asyncio.Future[None] | None = None
        self._heard_s = connection.time()
        self._latest_s = math.inf
        self.num_bytes = sum((limits or {}).values())
        """How much may go either way, where that is known."""

    @contextlib.contextmanager
    def bounded(self, num_bytes: int) -> Iterator[None]:
        """Meanwhile `send` and `receive` break the connection with an agent that is silent, or needs longer than so
        many bytes take on a slow line. Otherwise they wait for ever, as at a pipe whose other end is idle."""
        self._latest_s = self._connection.time() + SILENCE_S + num_bytes / _SLOWEST_BYTES_PER_S
        try:
            yield
        finally:
            self._latest_s = math.inf

    async def send(self, content: bytes) -> None:
        """Input, as the agent takes it. Ends early when the operation does."""
        view = memoryview(content)
        while view and not self.ended.done() and not self.input_closed:
            if self._credit <= 0 or self._connection.is_full:
                await self._change()
                continue
            size = min(len(view), self._credit, frames.CHUNK_BYTES)
            self._connection.write(frames.frame(frames.DATA, self.number, bytes(view[:size])))
            self._credit -= size
            view = view[size:]

    def end(self) -> None:
        """No more input."""
        if not self.ended.done():
            self._connection.write(frames.frame(frames.END, self.number))

    def control(self, **message: Any) -> None:
        if not self.ended.done():
            self._connection.write(frames.frame(frames.CONTROL, self.number, json.dumps(message).encode()))

    def answer(self, **result: Any) -> None:
        """Ends an operation that the agent opened."""
        if not self.ended.done():
            self._connection.write(frames.frame(frames.RESULT, self.number, json.dumps(result).encode()))
            self._connection.forget(self)
            self.ended.set_result(Ended())

    async def receive(self) -> tuple[int, bytes] | None:
        """Some output and its kind; None at the end. Raises what the connection broke with."""
        while not self._arrived:
            if self._output_ended or self.ended.done():
                if self.ended.done():
                    self.ended.result()
                return None
            await self._change()
        kind, content = self._arrived.popleft()
        self._unused -= len(content)
        self._acknowledge(len(content))
        return kind, content

    async def start(self) -> None:
        """Returns when it is under way, or has ended already. Raises what the connection broke with."""
        try:
            came = await self._comes(self._connection.time() + SILENCE_S, self.started, self.ended)
        except asyncio.CancelledError:
            await self.cancel()
            raise
        if not came:
            self._connection.lose(SandboxError(f"the sandbox's agent was silent for {SILENCE_S:g} s"))
        if self.ended.done():
            self.ended.result()

    async def result(self, *, silence_s: float | None = None) -> Ended:
        """How it ended. When the agent says nothing of it for so long (SILENCE_S), or speaks on for longer than all
        that may be said can take, the connection is broken. Cancelled, it cancels the operation and waits until that
        is done."""
        silence_s = SILENCE_S if silence_s is None else silence_s
        latest_s = self._connection.time() + silence_s + self.num_bytes / _SLOWEST_BYTES_PER_S
        try:
            while not await self._comes(min(self._heard_s + silence_s, latest_s), self.ended):
                now_s = self._connection.time()
                if now_s - self._heard_s >= silence_s:
                    self._connection.lose(SandboxError(f"the sandbox's agent was silent for {silence_s:g} s"))
                elif now_s >= latest_s:
                    self._connection.lose(SandboxError("the sandbox's agent brought an operation to no end"))
            return self.ended.result()
        except asyncio.CancelledError:
            await self.cancel()
            raise

    async def cancel(self) -> None:
        """Gives it up, and returns when the agent has done so, too, or is broken."""
        if not self.ended.done():
            self.control(cancel=True)
            await asyncio.wait([self.ended], timeout=_CANCEL_TIMEOUT_S)
            if not self.ended.done():
                self._connection.lose(SandboxError("the sandbox's agent did not cancel a command that it was told to"))

    def take(self, kind: int, body: bytes) -> None:
        """A frame from inside. Raises BrokenRuleError, or msgspec's error, for one that must not come, or that says
        nothing: else an agent could keep this process busy for nothing."""
        self._heard_s = self._connection.time()
        if kind == frames.DATA or (kind == frames.ERRORS and self.number < frames.INSIDE):
            self._keep(kind, body)
        elif kind == frames.STARTED:
            if self.started.done():
                raise BrokenRuleError("an operation that begins twice")
            self.started.set_result(None)
        elif kind == frames.END:
            if self._output_ended:
                raise BrokenRuleError("output that ends twice")
            self._output_ended = True
        elif kind == frames.ACK:
            self._credit += _number(body)
            if self._credit > frames.WINDOW_BYTES:
                raise BrokenRuleError("an ACK of more than was sent")
        elif kind == frames.CONTROL:
            self._note(_notice.decode(body))
        elif kind == frames.RESULT and self.number < frames.INSIDE:
            ended = _ended.decode(body)  # may raise; then the connection breaks, and this call with it
            self._connection.forget(self)
            self.ended.set_result(ended)
        else:
            raise BrokenRuleError(f"a frame of kind {kind} in an operation")
        self.wake()

    def fail(self, error: SandboxError) -> None:
        """The connection broke."""
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()  # it may be that nobody asks, which is no reason for a complaint
        self.wake()

    def wake(self) -> None:
        """Something changed that `send` or `receive` may wait for."""
        if self._changed and not self._changed.done():
            self._changed.set_result(None)
        self._changed = None

    def _keep(self, kind: int, body: bytes) -> None:
        if not body:
            raise BrokenRuleError("output that is none")
        if self._limits is not None:
            kept = self.kept.get(kind)
            if kept is None or len(kept) + len(body) > self._limits[kind]:
                raise BrokenRuleError(f"more output than was asked for (kind {kind})")
            kept += body
            return self._acknowledge(len(body))
        self._unused += len(body)
        if self._unused + self._used > frames.WINDOW_BYTES:
            raise BrokenRuleError("more output than the window allows")
        if self._arrived and self._arrived[-1][0] == kind and len(self._arrived[-1][1]) < _SMALL_BYTES:
            body = self._arrived.pop()[1] + body
        self._arrived.append((kind, body))

    def _note(self, notice: Notice) -> None:
        if notice.stdin and not self.input_closed:
            self.input_closed = True
        elif notice.cancel and self.number >= frames.INSIDE:
            self._connection.forget(self)
            self.ended.set_result(Ended(error="cancelled"))
        else:
            raise BrokenRuleError("a notice that says nothing")

    def _acknowledge(self, count: int) -> None:
        self._used += count
        if self._used >= frames.WINDOW_BYTES // 4 and not self.ended.done():
            self._connection.write(frames.frame(frames.ACK, self.number, frames.COUNT.pack(self._used)))
            self._used = 0

    async def _change(self) -> None:
        self._changed = self._changed or asyncio.get_running_loop().create_future()
        now_s = self._connection.time()
        left_s = min(SILENCE_S, self._latest_s - now_s) if self._latest_s < math.inf else math.inf
        if not await self._comes(now_s + left_s, self._changed):
            what = "was silent" if left_s >= SILENCE_S else "brought an operation to no end"
            self._connection.lose(SandboxError(f"the sandbox's agent {what} ({left_s:g} s)"))

    async def _comes(self, until_s: float, *futures: asyncio.Future[Any]) -> bool:
        """Whether one of them is done by then, a time of the connection's clock."""
        while True:
            left_s = max(_SHORTEST_WAIT_S, until_s - self._connection.time())
            timeout_s = None if left_s == math.inf else left_s
            done, _ = await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if done or self._connection.time() >= until_s:
                return bool(done)


def _number(body: bytes) -> int:
    """Of an ACK. Raises BrokenRuleError for what is none, or is 0."""
    if len(body) != frames.COUNT.size or not any(body):
        raise BrokenRuleError("an ACK that is no number")
    return frames.COUNT.unpack(body)[0]


class Connection(asyncio.Protocol):
    """All operations with one agent, over any asyncio transport."""

    def __init__(self, forward: Mapping[int, str] | None = None, lost: Callable[[SandboxError], None] | None = None):
        """`forward` leads from loopback ports inside to unix sockets here. `lost` is called once, when it is over."""
        self.error: SandboxError | None = None
        """Why nothing goes any more."""
        self.is_full = False
        """The transport has enough to send for now."""
        self._forward = forward or {}
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._closed = asyncio.get_running_loop().create_future()
        self._decoder = frames.Decoder()
        self._calls: dict[int, Party] = {}
        self._numbers = 0
        self._callers: set[asyncio.Task[None]] = set()
        self._held: list[bytes] | None = None
        self._stray_bytes = 0
        """So much may still come of operations that have been forgotten."""

    @classmethod
    async def over(
        cls,
        connected: socket.socket,
        settings: Settings | None = None,
        forward: Mapping[int, str] | None = None,
        lost: Callable[[SandboxError], None] | None = None,
    ) -> Connection:
        """Takes over a connected unix socket. `settings` are for an agent that was not forked with them."""
        loop = asyncio.get_running_loop()
        _, self = await loop.create_unix_connection(lambda: cls(forward, lost), sock=connected)
        if settings:
            self.configure(settings)
        return self

    def configure(self, settings: Settings) -> None:
        """Must come before any operation."""
        self.write(frames.frame(frames.SETTINGS, 0, json.dumps(settings.to_json()).encode()))

    def call(
        self, request: Mapping[str, Any], content: bytes | None = b"", limits: Mapping[int, int] | None = None
    ) -> Call:
        """Begins an operation whose whole input is `content`; with None, its input is to follow.

        Raises SandboxError when the connection is lost, and ValueError for a request that is too long.
        """
        if self.error:
            raise type(self.error)(*self.error.args)
        body = json.dumps(request).encode()
        if len(body) > frames.MAX_BODY_BYTES:
            raise ValueError(
                f"environment and paths of one operation take {len(body)} bytes; give {frames.MAX_BODY_BYTES} at most"
            )
        call = Call(self, limits)
        call.num_bytes += len(content or b"")
        self.enter(call)
        opening = frames.frame(frames.OPEN, call.number, body)
        if content is None:
            self.write(opening)
        elif len(content) <= frames.CHUNK_BYTES:
            data = frames.frame(frames.DATA, call.number, content) if content else b""
            self.write(opening + data + frames.frame(frames.END, call.number))
        else:
            self.write(opening)
            self.feed(call, content)
        return call

    def feed(self, call: Call, content: bytes) -> None:
        """Sends all the input that an operation gets, while whoever began it goes on."""
        self._keep_task(self._send_all(call, content))

    def time(self) -> float:
        """The loop's, which stands still here while the transport has lost its connection and may take it up again
        (`remote/line.py`): the agent is not silent then, but not to be heard."""
        lost_s = self._transport.get_extra_info("lost_s", 0.0) if self._transport else 0.0
        return asyncio.get_running_loop().time() - lost_s

    @property
    def is_idle(self) -> bool:
        """No operation is under way, from either side, and nothing is on its way to the agent."""
        return not (self._calls or self._callers or (self._transport and self._transport.get_write_buffer_size()))

    def hold(self) -> None:
        """From now on nothing is sent, so that the agent can be replaced by another one that has the same socket."""
        self._held = []

    def release(self) -> None:
        """Sends what was held."""
        held, self._held = self._held or (), None
        for content in held:
            self.write(content)

    async def ping(self, *, timeout_s: float) -> None:
        """Returns when the agent answers. When it does not within that time, the connection is broken."""
        await self.call({"do": "ping"}).result(silence_s=timeout_s)

    def write(self, content: bytes) -> None:
        if self._held is not None:
            self._held.append(content)
        elif self._transport and not self.error:
            self._transport.write(content)

    def enter(self, call: Party) -> None:
        """Gives an operation a number; from now on it gets the agent's frames."""
        self._numbers = self._numbers % (frames.INSIDE - 1) + 1
        call.number = self._numbers
        self._calls[call.number] = call

    def forget(self, call: Party) -> None:
        if self._calls.pop(call.number, None) is not None:
            self._stray_bytes = min(self._stray_bytes + 2 * frames.WINDOW_BYTES, _MAX_STRAY_BYTES)

    def lose(self, error: SandboxError) -> None:
        """Ends the connection and everything on it with this error. Only the first one counts."""
        if self.error:
            return
        self.error = error
        if self._transport:
            self._transport.abort()
        for call in list(self._calls.values()):
            call.fail(type(error)(*error.args))
        self._calls.clear()
        for task in self._callers:
            task.cancel()
        if self._lost:
            self._lost(error)

    async def close(self, error: SandboxError) -> None:
        """As `lose`, and returns when the transport is closed and all that was on it has ended."""
        self.lose(error)
        if self._transport:
            await asyncio.wait([self._closed, *self._callers], timeout=_CLOSE_TIMEOUT_S)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for kind, number, body in self._decoder.feed(data):
                if self.error:
                    return
                self._take(kind, number, body)
        except (frames.FrameError, BrokenRuleError, msgspec.MsgspecError, RecursionError) as error:
            self.lose(SandboxError(f"the sandbox's agent broke the protocol: {str(error)[:500]}"))

    def connection_lost(self, exc: Exception | None) -> None:
        ended = SandboxError(f"the sandbox's agent has ended ({exc or 'it closed the connection'})")
        self.lose(exc if isinstance(exc, SandboxError) else ended)
        if not self._closed.done():
            self._closed.set_result(None)

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        for call in list(self._calls.values()):
            call.wake()

    def _take(self, kind: int, number: int, body: bytes) -> None:
        call = self._calls.get(number)
        if kind == frames.OPEN:
            self._serve_caller(number, _asked.decode(body))
        elif call is not None:
            call.take(kind, body)
        elif number < frames.INSIDE and number > self._numbers:
            raise BrokenRuleError(f"a frame of operation {number}, which nobody began")
        else:
            self._stray_bytes -= frames.HEADER.size + len(body)
            if self._stray_bytes < 0:
                raise BrokenRuleError("more of operations that have ended than can have been on its way")

    def _serve_caller(self, number: int, asked: Asked) -> None:
        path = self._forward.get(asked.port) if asked.do == "forward" else None
        if path is None or number < frames.INSIDE or number in self._calls:
            raise BrokenRuleError(f"it opened {asked.do!r} to port {asked.port}, which it must not")
        call = self._calls[number] = Call(self, None, number)
        if len(self._callers) >= _MAX_CALLERS:
            if self.is_full:
                raise BrokenRuleError("it opens more than it reads answers of")
            return call.answer(error="ConnectionRefusedError")
        self._keep_task(_relay(call, path))

    def _keep_task(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._callers.add(task)
        task.add_done_callback(self._callers.discard)

    async def _send_all(self, call: Call, content: bytes) -> None:
        await call.send(content)
        call.end()


async def _relay(call: Call, path: str) -> None:
    """Connects a caller inside to a unix socket here, each direction as fast as its reader."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return call.answer(error="ConnectionRefusedError")
    try:
        async with asyncio.TaskGroup() as directions:
            directions.create_task(_outwards(call, writer))
            directions.create_task(_inwards(call, reader))
    except* (OSError, SandboxError):
        pass  # either end may hang up at any time; the other one is told below
    finally:
        call.answer()
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()


async def _outwards(call: Call, writer: asyncio.StreamWriter) -> None:
    while received := await call.receive():
        writer.write(received[1])
        await writer.drain()
    if call.ended.done():
        raise ConnectionResetError("the caller is gone")
    if writer.can_write_eof():
        writer.write_eof()


async def _inwards(call: Call, reader: asyncio.StreamReader) -> None:
    while content := await reader.read(frames.CHUNK_BYTES):
        await call.send(content)
        if call.ended.done():
            return
    call.end()
