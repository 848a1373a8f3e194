"""The client's end of a line into a sandbox: an asyncio transport that goes on when its WebSocket is lost."""

from __future__ import annotations

import asyncio
import random
import secrets
from typing import Any, cast

import aiohttp

from upspiral.errors import SandboxError, SandboxGoneError
from upspiral.sandbox.remote.api import Api
from upspiral.sandbox.server.resumable import MOST_MESSAGE_BYTES, Resumable, ResumeError
from upspiral.sandbox.server.session import BROKEN, GONE, MISBEHAVED
from upspiral.sandbox.server.wire import LeaseAnswer

_CONNECT_S = 10.0
_PING_S = 20.0
_CLOSING = cast(Any, aiohttp.ClientWSTimeout)(ws_close=1.0)
_OPTIONS: dict[str, Any] = {"heartbeat": _PING_S, "compress": 0, "timeout": _CLOSING}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 2.0
_LOST = (aiohttp.ClientError, ResumeError, TimeoutError, OSError)


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

    # What carries it

    def _carried(self, carrying: asyncio.Task[SandboxError]) -> None:
        self._protocol.connection_lost(None if carrying.cancelled() else carrying.result())

    async def _carry(self) -> SandboxError:
        """Returns why it ended."""
        loop = asyncio.get_running_loop()
        given_up_at, pause_s = loop.time() + self._patience_s, _FIRST_PAUSE_S
        while True:
            why: object = "the connection was closed"
            try:
                await self._carry_once()
                given_up_at, pause_s = loop.time() + self._patience_s, _FIRST_PAUSE_S
            except SandboxError as error:
                return error
            except _LOST as error:
                why = error
            if loop.time() >= given_up_at:
                where = f"{self._api.url} and sandbox {self._sandbox_id}"
                return SandboxError(f"no connection to {where} for {self._patience_s:g} s: {why!r}")
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    async def _carry_once(self) -> None:
        """To the end of one connection. Raises SandboxError when there is no use in another."""
        websocket = await self._connect()
        async with websocket:
            first = await websocket.receive_bytes(timeout=_CONNECT_S)
            self._stream.resume(Resumable.received_by_other(first))
            self._take(first)
            sending = asyncio.create_task(self._send(websocket))
            try:
                await self._receive(websocket)
            finally:
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
        except aiohttp.WSServerHandshakeError:
            # Why is told to requests only. Raises it, if it is something that lasts.
            await self._api.get(f"/sandboxes/{self._sandbox_id}", LeaseAnswer)
            raise

    async def _receive(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in websocket:
            if message.type is not aiohttp.WSMsgType.BINARY:
                raise SandboxError(f"the server at {self._api.url} sent {message.type.name}, not frames")
            self._take(message.data)
        if websocket.close_code == GONE:
            raise SandboxGoneError(f"sandbox {self._sandbox_id} is gone")
        if websocket.close_code in (BROKEN, MISBEHAVED):
            raise SandboxError(f"the server ended the line to sandbox {self._sandbox_id} ({websocket.close_code})")

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
