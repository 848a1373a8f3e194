"""Loopback ports inside: connected to for the host, and listened on for callers whom the host serves."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from typing import Any

from . import frames
from .loop import READABLE, WRITABLE
from .operations import Agent, Operation

_BACKLOG = 128
_MAX_CALLERS = 256
"""At a time. Further ones wait in the kernel's queue."""
_CONNECT_S = 5.0
"""Loopback takes no time, but a listener whose queue is full lets callers wait for minutes."""


class Stream(Operation):
    """Bytes between the host and a socket, both ways, each way closed by itself."""

    _socket: socket.socket | None = None
    _input_ended = False
    _output_ended = False

    def __init__(self, agent: Agent, number: int, request: dict[str, Any]):
        super().__init__(agent, number, request)
        self._unsent: deque[bytes] = deque()

    def data(self, content: bytes) -> None:
        self._unsent.append(content)
        self._send()

    def end(self) -> None:
        self._input_ended = True
        self._send()

    def produce(self) -> None:
        self._await()

    def release(self) -> None:
        if self._socket:
            self.agent.loop.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def let_go(self) -> None:
        """What the host has sent before still gets there."""
        if self.finished:
            return self.give_up()
        self._input_ended = self._output_ended = True
        self._send()

    def broken(self) -> None:
        """The socket failed, or both ways are closed."""
        self.finish()

    def _ready(self, events: int) -> None:
        if events & WRITABLE:
            self._send()
        if events & READABLE and not self._output_ended and self._socket:
            if self.has_room:
                self._receive(self._socket)
            else:
                self._await()

    def _receive(self, connection: socket.socket) -> None:
        try:
            content = connection.recv(frames.CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            return self.broken()
        if content:
            self.put(content)
        else:
            self._output_ended = True
            self.agent.send(frames.END, self.number)
        self._await()

    def _send(self) -> None:
        while self._unsent and self._socket:
            try:
                size = self._socket.send(self._unsent[0])
            except BlockingIOError:
                break
            except OSError:
                return self.broken()
            self.used(size)
            self._unsent[0] = self._unsent[0][size:]
            if not self._unsent[0]:
                self._unsent.popleft()
        if self._input_ended and not self._unsent and self._socket:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        self._await()

    def _await(self) -> None:
        """Nothing is awaited that nothing would be done about: the kernel would go on telling of it."""
        if not self._socket or self.finished:
            return
        if self._output_ended and self._input_ended and not self._unsent:
            return self.broken()
        events = READABLE if self.has_room and not self._output_ended else 0
        events |= WRITABLE if self._unsent else 0
        if events:
            self.agent.loop.watch(self._socket.fileno(), events, self._ready)
        else:
            self.agent.loop.forget(self._socket.fileno())


class Outward(Stream):
    """`connect`: to a TCP port that something inside listens on, by IPv4 or IPv6."""

    def begin(self) -> None:
        self._deadline = self.agent.loop.after(_CONNECT_S, lambda: self._refused(errno.ETIMEDOUT, []))
        self._try([(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])

    def _try(self, addresses: list[tuple[int, str]]) -> None:
        family, host = addresses.pop(0)
        self.release()
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        code = self._socket.connect_ex((host, self.request["port"]))
        if code in (0, errno.EINPROGRESS):
            self.agent.loop.watch(self._socket.fileno(), WRITABLE, lambda _events: self._connected(addresses))
        else:
            self._refused(code, addresses)

    def _connected(self, addresses: list[tuple[int, str]]) -> None:
        assert self._socket is not None
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            return self._refused(code, addresses)
        self._deadline.cancel()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.agent.send_json(frames.STARTED, self.number, {})
        self._send()

    def _refused(self, code: int, addresses: list[tuple[int, str]]) -> None:
        if addresses:
            try:
                return self._try(addresses)
            except OSError:
                pass  # no IPv6 here; the first address's reason is the one that counts
        error = ConnectionRefusedError if code in (errno.ECONNREFUSED, errno.EADDRNOTAVAIL) else OSError
        self.fail(error.__name__, os.strerror(code))


class Caller(Stream):
    """Somebody inside who called a forwarded port. The agent asks, the host serves."""

    def __init__(self, agent: Agent, number: int, listener: Listener, connection: socket.socket):
        super().__init__(agent, number, {})
        self._listener = listener
        self._socket = connection

    def begin(self) -> None:
        self._await()

    def release(self) -> None:
        super().release()
        self._listener.left()

    def broken(self) -> None:
        self.give_up()
        if self.agent.operations.pop(self.number, None):
            self.agent.send_json(frames.CONTROL, self.number, {"cancel": True})


class Listener:
    """A forwarded port."""

    def __init__(self, agent: Agent, port: int):
        self._agent = agent
        self._port = port
        self._callers = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen(_BACKLOG)
        self._socket.setblocking(False)
        self._await()

    def left(self) -> None:
        self._callers -= 1
        self._await()

    def _await(self) -> None:
        if self._callers < _MAX_CALLERS:
            self._agent.loop.watch(self._socket.fileno(), READABLE, self._accept)
        else:
            self._agent.loop.forget(self._socket.fileno())

    def _accept(self, _events: int) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return
        if not self._agent.is_attached:
            return connection.close()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._callers += 1
        number = self._agent.number_of_ours()
        self._agent.send_json(frames.OPEN, number, {"do": "forward", "port": self._port})
        self._agent.add(Caller(self._agent, number, self, connection))
        self._await()
