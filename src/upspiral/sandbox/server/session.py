"""A client's line into one sandbox: a resumable stream of frames, over one WebSocket after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from upspiral.sandbox.connection import Connection
from upspiral.sandbox.inside.frames import Decoder, FrameError
from upspiral.sandbox.server.relay import Relay
from upspiral.sandbox.server.resumable import MOST_MESSAGE_BYTES, Resumable, ResumeError
from upspiral.sandbox.server.wire import RETURN_S

GONE, REPLACED, MISBEHAVED = 4410, 4409, 4400
"""Why the server closes a WebSocket: the sandbox is gone; the client has opened another; the client broke the rules.
After anything else it may come back."""
MOST_UNREAD_BYTES = 64 << 20
"""What may wait for a client, of all its operations on one line."""
_LONGEST_REASON = 120
"""Bytes; a WebSocket closes with no longer one."""
_SLOWEST_SEND_S = 60.0


class Session:
    """Lives from its client's first WebSocket to the end of the lease, or until the client breaks the rules or does
    not come back. `seen` is called at every sign of the client, `observe_exec` with the seconds that a command took."""

    def __init__(
        self,
        connection: Callable[[], Connection],
        *,
        seen: Callable[[], None],
        observe_exec: Callable[[float], None],
    ) -> None:
        """`connection` gives the one to the sandbox's agent that stands now."""
        self._seen = seen
        self._stream = Resumable()
        self._decoder = Decoder()
        self._relay = Relay(connection, self._deliver, observe_exec)
        self._news = asyncio.Event()
        self._carrying = asyncio.Lock()
        self._over = asyncio.Event()
        self._why_over = (0, "")
        self._carrier: asyncio.Event | None = None
        """Set when another WebSocket takes over from the one that carries now."""
        self._return_timer: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    @property
    def is_carried(self) -> bool:
        return self._carrier is not None

    def close(self, code: int, why: str) -> None:
        if not self.is_over:
            self._why_over = (code, why)
            self._over.set()
            self._relay.close()
            self._stream.forget()

    async def carry(self, websocket: WebSocket, received: int) -> None:
        """Serves an accepted WebSocket whose client has received so many bytes, to its end. An older one is closed:
        whoever opens another knows better than this end whether that is dead."""
        if self._carrier is not None:
            self._carrier.set()
        if self._return_timer is not None:
            self._return_timer.cancel()
        replaced = self._carrier = asyncio.Event()
        try:
            async with self._carrying:
                # Only now: the older one takes nothing more from the stream.
                code, why = await self._carry_until(replaced, websocket, received)
        finally:
            if self._carrier is replaced:
                self._carrier = None
                self._return_timer = asyncio.get_running_loop().call_later(RETURN_S, self._abandon)
        with suppress(WebSocketDisconnect, RuntimeError):
            # It may be gone, whatever its state says.
            if websocket.client_state is WebSocketState.CONNECTED:
                await websocket.close(code, why.encode()[:_LONGEST_REASON].decode(errors="ignore"))

    async def _carry_until(self, replaced: asyncio.Event, websocket: WebSocket, received: int) -> tuple[int, str]:
        """Returns with what the WebSocket is to be closed."""
        if self.is_over:
            return self._why_over
        try:
            self._stream.resume(received)
            await websocket.send_bytes(self._stream.next_message())
        except ResumeError as error:
            return MISBEHAVED, str(error)
        except (WebSocketDisconnect, RuntimeError):
            return REPLACED, ""
        await self._until_any_ends([self._receive(websocket), self._send(websocket), replaced.wait()])
        return self._why_over if self.is_over else (REPLACED, "another connection took over")

    def _abandon(self) -> None:
        if not self.is_carried:
            self.close(GONE, f"its client did not come back within {RETURN_S:g} s")

    async def _until_any_ends(self, work: Sequence[Coroutine[Any, Any, Any]]) -> None:
        tasks = [asyncio.ensure_future(each) for each in (*work, self._over.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, websocket: WebSocket) -> None:
        while True:
            message = await websocket.receive()
            if message["type"] != "websocket.receive":
                return
            self._seen()
            try:
                content = message.get("bytes")
                if content is None or len(content) > MOST_MESSAGE_BYTES:
                    raise FrameError(f"a message has at most {MOST_MESSAGE_BYTES} bytes, and no text")
                # Without a pause up to here: what was counted as received is on its way.
                for kind, number, body in self._decoder.feed(self._stream.take(content)):
                    self._relay.from_client(kind, number, body)
            except (FrameError, ResumeError, RecursionError) as error:
                self.close(MISBEHAVED, str(error)[:100])
                return
            if self._stream.has_news:
                self._news.set()
            await self._relay.drain()

    async def _send(self, websocket: WebSocket) -> None:
        while True:
            while self._stream.has_news:
                async with asyncio.timeout(_SLOWEST_SEND_S):
                    await websocket.send_bytes(self._stream.next_message())
            self._news.clear()
            await self._news.wait()

    def _deliver(self, frame: bytes) -> None:
        self._stream.write(frame)
        self._news.set()
        if self._stream.unconfirmed_bytes > MOST_UNREAD_BYTES:
            self.close(MISBEHAVED, f"{MOST_UNREAD_BYTES >> 20} MiB wait for a client that does not read")
