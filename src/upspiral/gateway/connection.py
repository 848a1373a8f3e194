"""One client's connection: who sends too slowly, sends too much before a request begins, or stops reading is let go.

uvicorn parses and answers; what it leaves unbounded is bounded here: the time until headers are complete, their size
while they are incomplete, requests that end before their body does, answers that nobody takes, and the number of
connections. Limits on what is complete are held by `LimitedApp`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from websockets.http11 import MAX_LINE_LENGTH

from upspiral.gateway.limits import LINGER_S, Limits, headers_refused, refusal
from upspiral.gateway.reader_watch import ReaderWatch, WatchedConnection

_SPARE_CONNECTIONS = 64
"""Beyond the limit, so many are told that there is no room; the others are dropped without a word."""
_LINE_MARGIN = 20
"""What stands on a line beside an address, or beside a header's name and value, is shorter."""


class Connection(WatchedConnection, HttpToolsProtocol):
    """What uvicorn makes for each client. `limits` is shared by all of them."""

    def __init__(self, *, limits: Limits, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limits = limits
        self._is_excess = False
        self._is_refused = False
        """It has been told so; what it still sends is not looked at."""
        self._headers_open = False
        self._body_open = False
        self._header_bytes = 0
        """Received since the last complete headers, while others are awaited."""
        self._header_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._is_upgraded = False

    # What the event loop says

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch = ReaderWatch(self.loop, transport, self._limits)
        excess = len(self.connections) - self._limits.connections
        self._is_excess = excess > 0
        if excess > _SPARE_CONNECTIONS:
            transport.abort()
            return
        patience_s = LINGER_S if self._is_excess else self._limits.header_timeout_s
        self._header_timer = self.loop.call_later(patience_s, self._headers_late)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._is_excess:
            # Said only now, as the answer to a request.
            self._refuse(503, refusal("the gateway has no connection left; try again later", "too_many_connections"))
            return
        if not self._body_open:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._is_refused or self._is_upgraded or self.transport.is_closing() or self._body_open:
            return
        if self._headers_open and self._header_bytes > self._limits.header_bytes:
            self._refuse(431, headers_refused(self._limits))
        elif not self._headers_open and self._is_idle() and self._header_timer is None:
            self._expect_next_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._watch.stop()
        self._stop_timers()

    # What the parser says

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers_open = True
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_timeout_s, self._headers_late)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers, which would grow the headers of a request that is already being answered, are dropped.
        if self._headers_open:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._headers_open, self._body_open, self._header_bytes = False, True, 0
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body_open = False
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
            self._expect_next_request()
        super().on_message_complete()

    # What uvicorn says

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch.start()
        elif self._body_open and self._is_idle():
            self._linger_timer = self.loop.call_later(LINGER_S, self._drop)

    def handle_websocket_upgrade(self) -> None:
        if not self._is_idle():
            # The answer before it is still being written; a handshake would be taken for a part of that.
            self._drop()
        elif self._has_large_headers():
            self._refuse(431, headers_refused(self._limits))
        elif self.scope["method"] != "GET" or not self.url.isascii():
            self._refuse(400, refusal("a WebSocket is opened with GET and an address in ASCII", "invalid_request"))
        else:
            self._is_upgraded = True
            self._stop_timers()
            self._watch.stop()
            super().handle_websocket_upgrade()

    def timeout_keep_alive_handler(self) -> None:
        # An answer that is still waiting to be read would keep a closing connection open for ever.
        self._drop()

    def send_400_response(self, msg: str) -> None:
        # uvicorn would close at once, under a client that still sends.
        self._refuse(400, refusal(msg, "invalid_request"))

    # What time says

    def _headers_late(self) -> None:
        self._header_timer = None
        if self._is_refused:
            return
        if self.transport.is_closing() or not self._headers_open:
            self._drop()
        elif self._is_idle():
            limit = f"{self._limits.header_timeout_s:g} s"
            self._refuse(408, refusal(f"the request's headers were not complete within {limit}", "request_timeout"))
        else:
            # The late one stands behind a request that is being answered; nothing can be said before that is done.
            self._header_timer = self.loop.call_later(self._limits.header_timeout_s, self._headers_late)

    # How it ends

    def _has_large_headers(self) -> bool:
        """Whether the headers are more than `LimitedApp` takes, or than the WebSocket library reads."""
        sizes = [len(name) + len(value) for name, value in self.headers]
        longest = max(len(self.url), *sizes) + _LINE_MARGIN
        total = sum(sizes)
        return len(sizes) > self._limits.headers or total > self._limits.header_bytes or longest > MAX_LINE_LENGTH

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_next_request(self) -> None:
        """uvicorn forgets its idle timer with the first byte, even one that begins nothing."""
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _refuse(self, status: int, body: bytes) -> None:
        """Answers what is no complete request, and reads no other. While another is being answered, the connection
        just ends: an answer in the middle of an answer would be taken for a part of it."""
        if not self._is_idle():
            self._drop()
            return
        self._is_refused = True
        length = str(len(body)).encode()
        head = b"content-type: application/json\r\ncontent-length: " + length + b"\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.write_eof()
        self._linger_timer = self.loop.call_later(LINGER_S, self._drop)

    def _drop(self) -> None:
        """Closes, and does not wait for ever until what is left has been read."""
        self.transport.close()
        self._watch.start()

    def _stop_timers(self) -> None:
        for timer in (self._header_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
