"""The client's end of a line into a sandbox: an asyncio transport that goes on when its WebSocket is lost."""

from __future__ import annotations

import asyncio
import random
import secrets
from typing import Any, cast

import aiohttp

from upspiral.errors import CapabilityError, SandboxError, SandboxGoneError
from upspiral.sandbox.remote.api import Api
from upspiral.sandbox.server.resumable import MOST_MESSAGE_BYTES, Resumable, ResumeError
from upspiral.sandbox.server.session import GONE, MISBEHAVED
from upspiral.sandbox.server.wire import LeaseAnswer

_CONNECT_S = 10.0
_PING_S = 8.0
"""A connection that is silent for half as long again is lost: before a command is given up for the silence of its agent
(`connected.GRACE_S`)."""
_CLOSING = cast(Any, aiohttp.ClientWSTimeout)(ws_close=1.0)
_NO_AGENT, _LINE_OVER = 422, 410
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 2.0
_NOTICED_S = 1.5 * _PING_S
_LOST = (aiohttp.ClientError, ResumeError, TimeoutError, OSError)


def back_within_s(patience_s: float) -> float:
    """The longest that the server does not hear of a client whose line is lost and taken up again: until the loss is
    noticed, and until the last connection that is tried stands. Servers must wait longer (`wire.py`)."""
    return _NOTICED_S + patience_s + _LONGEST_PAUSE_S + _CONNECT_S


class Line(asyncio.Transport):
    """Brings a protocol's bytes to a sandbox's agent, and the agent's to the protocol.

    Lost connections are taken up again where they ended; the protocol does not notice. It ends, with a SandboxError,
    when the sandbox is gone, or when no connection could be made for `patience_s`.
    """

    def __init__(self, api: Api, sandbox_id: str, protocol: asyncio.Protocol, *, patience_s: float) -> None:
        super().__init__()
        self._api = api
        self._sandbox_id = sandbox_id
        self._patience_s = patience_s
        self._session = secrets.token_hex(12)
        """Whoever knows it, and the token, can take the line over."""
        self._protocol = protocol
        self._stream = Resumable()
        self._news = asyncio.Event()
        self._is_paused = False
        self._stands = False
        self._stood_at = asyncio.get_running_loop().time()
        """When a connection stood last."""
        self._lost_s = 0.0
        """How long there was none, before the one that stands or stood last."""
        self._carrying = asyncio.create_task(self._carry())
        self._carrying.add_done_callback(self._carried)
        protocol.connection_made(self)

    # What the protocol says

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._stream.write(bytes(data))
        self._news.set()
        if self._stream.is_full and not self._is_paused:
            self._is_paused = True
            self._protocol.pause_writing()

    def abort(self) -> None:
        self._carrying.cancel()

    def close(self) -> None:
        self.abort()

    def is_closing(self) -> bool:
        return self._carrying.done() or self._carrying.cancelling() > 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """`lost_s`: for how long, all in all, there was no connection."""
        if name != "lost_s":
            return super().get_extra_info(name, default)
        return self._lost_s + (0.0 if self._stands else asyncio.get_running_loop().time() - self._stood_at)

    # What carries it

    def _carried(self, carrying: asyncio.Task[SandboxError]) -> None:
        """Whatever ended it: a protocol that is not told waits for ever."""
        why = None if carrying.cancelled() else carrying.exception() or carrying.result()
        self._protocol.connection_lost(why if isinstance(why, Exception) else None)

    async def _carry(self) -> SandboxError:
        """Returns why it ended."""
        loop, pause_s = asyncio.get_running_loop(), _FIRST_PAUSE_S
        while True:
            why: object = "the connection was closed"
            before = self._stood_at
            try:
                await self._carry_once()
            except SandboxError as error:
                return error
            except _LOST as error:
                why = error
            if self._stood_at > before:
                pause_s = _FIRST_PAUSE_S
            if loop.time() >= self._stood_at + self._patience_s:
                where = f"{self._api.url} and sandbox {self._sandbox_id}"
                return SandboxError(f"no connection to {where} for {self._patience_s:g} s: {why!r}")
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    async def _carry_once(self) -> None:
        """To the end of one connection. Raises SandboxError when there is no use in another."""
        websocket = await self._connect()
        async with websocket:
            first = self._content(await websocket.receive(timeout=_CONNECT_S))
            if first is None:
                return
            self._stream.resume(Resumable.received_by_other(first))
            self._take(first)
            self._lost_s, self._stands = self.get_extra_info("lost_s"), True
            sending = asyncio.create_task(self._send(websocket))
            try:
                await self._receive(websocket)
            finally:
                self._stood_at, self._stands = asyncio.get_running_loop().time(), False
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        url = f"{self._api.url}/sandboxes/{self._sandbox_id}/frames"
        query = {"session": self._session, "received": str(self._stream.received)}
        try:
            async with asyncio.timeout(_CONNECT_S):
                return await self._api.session.ws_connect(
                    url,
                    params=query,
                    max_msg_size=2 * MOST_MESSAGE_BYTES,
                    heartbeat=_PING_S,
                    compress=0,
                    timeout=_CLOSING,
                )
        except aiohttp.WSServerHandshakeError as error:
            # Why is told to requests only. This raises it, if it is about the sandbox.
            await self._api.get(f"/sandboxes/{self._sandbox_id}", LeaseAnswer)
            if error.status == _NO_AGENT:
                raise CapabilityError("this server's sandboxes have no agent that anything could be asked of") from None
            if error.status == _LINE_OVER:
                raise SandboxError(f"the server has given the line to sandbox {self._sandbox_id} up") from None
            raise

    async def _receive(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        while (message := self._content(await websocket.receive())) is not None:
            self._take(message)

    def _content(self, message: aiohttp.WSMessage) -> bytes | None:
        """None when the connection is lost. Raises SandboxError when there is no use in another."""
        if message.type is aiohttp.WSMsgType.BINARY:
            return message.data
        if message.type is aiohttp.WSMsgType.CLOSE and message.data == GONE:
            raise SandboxGoneError(f"sandbox {self._sandbox_id} is gone: {message.extra}")
        if message.type is aiohttp.WSMsgType.CLOSE and message.data == MISBEHAVED:
            raise SandboxError(f"the server ended the line to sandbox {self._sandbox_id}: {message.extra}")
        if message.type is aiohttp.WSMsgType.TEXT:
            raise SandboxError(f"the server at {self._api.url} sent text, not frames")
        return None

    def _take(self, message: bytes) -> None:
        content = self._stream.take(message)
        if self._is_paused and not self._stream.is_full:
            self._is_paused = False
            self._protocol.resume_writing()
        if self._stream.has_news:
            self._news.set()
        if content:
            self._protocol.data_received(content)

    async def _send(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            while self._stream.has_news:
                await websocket.send_bytes(self._stream.next_message())
            self._news.clear()
            await self._news.wait()
