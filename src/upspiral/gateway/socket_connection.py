"""One client's WebSocket: what uvicorn leaves unbounded is bounded here, as `connection.py` does it for requests.

The size of a message and the pings are uvicorn's. Here: the time that a message takes, messages that nobody reads, and
what is logged.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio.transports import BaseTransport, Transport
from typing import Any, cast

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from upspiral.gateway.limits import LINGER_S, Limits
from upspiral.gateway.reader_watch import ReaderWatch, WatchedConnection

_TOO_SLOW = 1008


class SocketConnection(WatchedConnection, WebSocketsSansIOProtocol):
    """What becomes of a `Connection` that is upgraded. `limits` is shared by all of them."""

    def __init__(self, *, limits: Limits, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._message_timer: asyncio.TimerHandle | None = None
        # uvicorn and websockets log addresses and headers, which hold keys, for whoever listens closely enough.
        self.logger = self.conn.logger = _quiet_logger()
        self.conn.debug = False

    # What the event loop says

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self._watch = ReaderWatch(self.loop, cast(Transport, transport), self._limits)
        self._handshake_timer = self.loop.call_later(self._limits.header_timeout_s, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.close_sent or not (self.frames or self.conn.reader.buffer):
            self._stop_message_timer()
        elif self._message_timer is None:
            self._message_timer = self.loop.call_later(self._limits.body_timeout_s, self._message_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch.stop()
        self._handshake_timer.cancel()
        self._stop_message_timer()

    # What uvicorn says

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        if self.close_sent:
            # Refused with a response of HTTP, which uvicorn takes for a handshake that was forgotten.
            self.handshake_complete = True
        if self.handshake_complete:
            self._handshake_timer.cancel()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        # uvicorn closes now; what is left may never be read.
        self._watch.start()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self._watch.start()

    def handle_parser_exception(self) -> None:
        """Says why the connection ends, such as a message that is too large, and goes on reading for a moment: closing
        at once would reset the connection, and the client would never see it."""
        if not self.close_sent:
            self._end()

    # What time says

    def _message_late(self) -> None:
        self._message_timer = None
        if not self.close_sent and not self.transport.is_closing():
            self.conn.fail(_TOO_SLOW, f"a message did not arrive within {self._limits.body_timeout_s:g} s")
            self._end()

    # How it ends

    def _end(self) -> None:
        closed = self.conn.close_sent
        assert closed is not None
        self.stop_keepalive()
        self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": closed.code, "reason": closed.reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.resume_reading()
        self.close_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _stop_message_timer(self) -> None:
        if self._message_timer is not None:
            self._message_timer.cancel()
            self._message_timer = None


def _quiet_logger() -> logging.Logger:
    logger = logging.getLogger("uvicorn.error.websocket")
    logger.setLevel(logging.WARNING)
    return logger
