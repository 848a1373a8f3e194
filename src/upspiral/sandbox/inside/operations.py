"""The agent's end of the wire: operations by number, and the socket that they share.

What the operations do is told by `Operation`'s subclasses in the other modules; `agent.py` lists them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from . import frames
from .launch import Launcher
from .loop import READABLE, WRITABLE, Loop, Timer
from .results import Results
from .settings import Settings

_RECEIVE_BYTES = 256 << 10
_BACKLOG_BYTES = 512 << 10
"""Output waits in its operation when so much is under way already, so that a short answer is not behind a long one."""


class Agent:
    """Serves one connection at a time, to the end of the socket or, with `Settings.orphan_s`, through several."""

    def __init__(self, settings: Settings, do: dict[str, Make], listener: socket.socket | None = None):
        """`do` makes an operation by the name that the host asks for."""
        self.settings = settings
        self.loop = Loop(before_wait=self._flush)
        self.launcher = Launcher(settings)
        self.results: Results[Any] = Results()
        self.operations: dict[int, Operation] = {}
        self._do = do
        self._listener = listener
        self._socket: socket.socket | None = None
        self._decoder = frames.Decoder()
        self._outgoing: deque[bytes] = deque()
        self._outgoing_bytes = 0
        self._starving: dict[int, Operation] = {}
        self._farewell: Timer | None = None
        self._awaited = 0
        self._next_number = frames.INSIDE
        self._oom_fd = settings.oom_fd if settings.oom_fd is not None else _first_open(settings.oom_paths)
        if listener:
            listener.setblocking(False)
            self.loop.watch(listener.fileno(), READABLE, self._accept)

    def attach(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        if self._farewell:
            self._farewell.cancel()
        self._socket, self._decoder = connection, frames.Decoder()
        self._awaited = 0
        self._await_socket(READABLE)

    @property
    def is_attached(self) -> bool:
        return self._socket is not None

    @property
    def has_room(self) -> bool:
        return self._outgoing_bytes < _BACKLOG_BYTES

    def send(self, kind: int, operation: int, body: bytes = b"") -> None:
        if self._socket:
            content = frames.frame(kind, operation, body)
            self._outgoing.append(content)
            self._outgoing_bytes += len(content)

    def send_json(self, kind: int, operation: int, message: dict[str, Any]) -> None:
        self.send(kind, operation, json.dumps(message).encode())

    def oom_kills(self) -> int:
        """How often the kernel killed something in this sandbox for want of memory, as far as is known."""
        if self._oom_fd is None:
            return 0
        lines = os.pread(self._oom_fd, 4096, 0).split(b"\n")
        return sum(int(line.split()[1]) for line in lines if line.startswith(b"oom_kill "))

    def starve(self, operation: Operation) -> None:
        """It goes on when the socket has taken what waits."""
        self._starving[operation.number] = operation

    def close(self, operation: Operation, result: dict[str, Any]) -> None:
        if self.operations.pop(operation.number, None):
            self.send_json(frames.RESULT, operation.number, result)

    def number_of_ours(self) -> int:
        """For an operation that the agent opens."""
        number = self._next_number
        self._next_number = frames.INSIDE + (number + 1) % frames.INSIDE
        return number

    def add(self, operation: Operation) -> None:
        """From now on it gets what the host sends for it."""
        self.operations[operation.number] = operation
        try:
            operation.begin()
        except OSError as error:
            operation.fail(type(error).__name__, error.strerror or str(error))

    def _accept(self, _events: int) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if self._socket:
            self._lose()  # the host knows better than this end whether the old one is dead
        self.attach(connection)

    def _ready(self, events: int) -> None:
        if events & WRITABLE:
            self._flush()
        if events & ~WRITABLE and self._socket:
            self._receive()

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            received = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            return self._lose()
        for kind, number, body in self._decoder.feed(received):
            self._take(kind, number, body)

    def _take(self, kind: int, number: int, body: bytes) -> None:
        operation = self.operations.get(number)
        if kind == frames.OPEN:
            self._open(number, json.loads(body))
        elif operation is None or kind == frames.SETTINGS:
            return  # it has ended, and the host did not know yet
        elif kind == frames.ACK:
            operation.credit(frames.COUNT.unpack(body)[0])
        elif kind == frames.RESULT:
            self.operations.pop(number)
            operation.let_go()
        else:
            self._input(operation, kind, body)

    def _input(self, operation: Operation, kind: int, body: bytes) -> None:
        """What the operation cannot do for want of something inside is its result."""
        try:
            message = json.loads(body) if kind == frames.CONTROL else {}
            if message.get("cancel"):
                operation.let_go()
                self.close(operation, {"error": "cancelled"})
            elif operation.finished:
                return  # all that is left of it is output that waits for its turn
            elif kind == frames.DATA:
                operation.data(body)
            elif kind == frames.END:
                operation.end()
            elif kind == frames.CONTROL:
                operation.control(message)
        except OSError as error:
            operation.fail(type(error).__name__, error.strerror or str(error))

    def _open(self, number: int, request: dict[str, Any]) -> None:
        make = self._do.get(request["do"])
        if make is None:
            return self.send_json(frames.RESULT, number, {"error": f"the agent cannot {request['do']!r}"})
        self.add(make(self, number, request))

    def _flush(self) -> None:
        """Gives the socket what waits, and those who waited for that their turn."""
        while self._outgoing and self._socket:
            try:
                taken = self._socket.sendmsg([self._outgoing[i] for i in range(min(len(self._outgoing), 64))])
            except BlockingIOError:
                return self._await_socket(READABLE | WRITABLE)
            except OSError:
                return self._lose()
            self._outgoing_bytes -= taken
            while taken and taken >= len(self._outgoing[0]):
                taken -= len(self._outgoing.popleft())
            if taken:
                self._outgoing[0] = self._outgoing[0][taken:]
            if self.has_room and self._starving:
                starving, self._starving = self._starving, {}
                for operation in starving.values():
                    operation.resume()
        self._await_socket(READABLE)

    def _await_socket(self, events: int) -> None:
        if self._socket and events != self._awaited:
            self.loop.watch(self._socket.fileno(), events, self._ready)
            self._awaited = events

    def _lose(self) -> None:
        """The connection is gone. Commands that have a name may be asked about again; nothing else goes on."""
        assert self._socket is not None
        self.loop.forget(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._outgoing.clear()
        self._outgoing_bytes = 0
        self._starving.clear()
        operations, self.operations = list(self.operations.values()), {}
        if self._listener is None:
            return self.loop.stop()
        for operation in operations:
            operation.lose()
        self._farewell = self.loop.after(self.settings.orphan_s, self.loop.stop)


class Operation:
    """One thing that the host asked for, or a caller that the agent brought to the host.

    A subclass starts in `begin`, where an OSError becomes the result, says what happens with the host's `data`, `end`
    and `control`, produces output in `produce`, and frees what it holds in `release`. It calls `finish` once.
    """

    def __init__(self, agent: Agent, number: int, request: dict[str, Any]):
        self.agent = agent
        self.request = request
        self.number = number
        self.finished = False
        self._credit = frames.WINDOW_BYTES
        self._used = 0
        self._waiting: deque[tuple[int, memoryview]] = deque()
        self._result: dict[str, Any] | None = None

    def begin(self) -> None:
        """The operation is known to the agent."""

    def data(self, content: bytes) -> None:
        """Input. Calls `used` when it is done with it."""
        self.used(len(content))

    def end(self) -> None:
        """No more input."""

    def control(self, message: dict[str, Any]) -> None:
        """Any message but the one that cancels."""

    def produce(self) -> None:
        """There is room for output; `put` as much as there is, while `has_room`."""

    def release(self) -> None:
        """Ends whatever runs for it and closes what is open. Called once, at the end or when it is given up."""

    @property
    def has_room(self) -> bool:
        """More output may be produced. When not, `produce` is called once it may."""
        if not self.agent.has_room:
            self.agent.starve(self)
            return False
        return not self._waiting and self._credit > 0

    def used(self, count: int) -> None:
        """Input is out of the way, so as much more may come."""
        self._used += count
        if self._used >= frames.WINDOW_BYTES // 4:
            self.agent.send(frames.ACK, self.number, frames.COUNT.pack(self._used))
            self._used = 0

    def put(self, content: bytes | bytearray, kind: int = frames.DATA) -> None:
        """Sends output as the window allows."""
        if content:
            self._waiting.append((kind, memoryview(content)))
            self._flush()

    def finish(self, **result: Any) -> None:
        """The result goes out behind the output; nothing happens afterwards."""
        if not self.finished:
            self.finished = True
            self._result = result
            self.release()
            self._flush()

    def fail(self, error: str, message: str = "") -> None:
        """`error` is the name of a Python exception that the host raises, or a sentence of this package's."""
        self._waiting.clear()
        self.finish(error=error, message=message)

    def give_up(self) -> None:
        """Nobody waits for it any more, nor for its output."""
        self._waiting.clear()
        if not self.finished:
            self.finished = True
            self.release()

    def let_go(self) -> None:
        """The host is done with it."""
        self.give_up()

    def lose(self) -> None:
        """The connection is gone, and another one may come."""
        self.give_up()

    def credit(self, count: int) -> None:
        self._credit += count
        self.resume()

    def resume(self) -> None:
        """Something that output may have waited for has come."""
        self._flush()
        if not self.finished and self.has_room:
            try:
                self.produce()
            except OSError as error:
                self.fail(type(error).__name__, error.strerror or str(error))

    def _flush(self) -> None:
        while self._waiting and self._credit > 0 and self.agent.has_room:
            kind, content = self._waiting.popleft()
            size = min(len(content), self._credit, frames.CHUNK_BYTES)
            self.agent.send(kind, self.number, bytes(content[:size]))
            self._credit -= size
            if size < len(content):
                self._waiting.appendleft((kind, content[size:]))
        if not self.agent.has_room:
            self.agent.starve(self)
        elif self._result is not None and not self._waiting:
            self.agent.close(self, self._result)


class Ping(Operation):
    """`ping`: the agent is there."""

    def begin(self) -> None:
        self.finish()


def _first_open(paths: tuple[str, ...]) -> int | None:
    for path in paths:
        with contextlib.suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return None


Make = Callable[[Agent, int, "dict[str, Any]"], Operation]
"""From the agent, the operation's number and the request."""
