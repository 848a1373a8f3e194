"""What one client of the gateway may take, and the part of it that can be held above HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from upspiral.errors import RequestError

LINGER_S = 2.0
"""How long a client may go on sending what nobody reads once it has been answered. Closing at once would reset the
connection, and it would never see why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Generous for every agent that we know, and finite for everybody else. Times in seconds."""

    body_bytes: int = 64 * 2**20
    """The largest body of a request, or message of a WebSocket. A history of a million tokens has about 5 MB."""
    header_bytes: int = 64 * 2**10
    """Request line and headers together."""
    headers: int = 100
    connections: int = 4096
    """Connections at the same time; never more than the process has file descriptors for."""
    header_timeout_s: float = 20.0
    """From the first byte of a request (or from connecting) until its headers are complete."""
    body_timeout_s: float = 60.0
    """From complete headers until the body is complete; for a message of a WebSocket, from its first byte to its last.
    """
    idle_timeout_s: int = 75
    """Between requests. Longer than HTTP clients keep a connection, so that none is closed just as it is used again."""
    stall_timeout_s: float = 30.0
    """A client that does not take `stall_bytes` of a waiting answer in this time has stopped reading."""
    stall_bytes: int = 16 * 2**10
    ping_interval_s: float = 15.0
    """Between pings of a WebSocket, so that no proxy takes it for dead."""
    pong_timeout_s: float = 300.0
    """A WebSocket whose client does not answer a ping in this time is closed. Generous: an agent may run its tools in
    the thread that would answer."""


class BodyTooLargeError(RequestError):
    """The request's body is larger than the gateway takes."""

    status = 413
    code = "request_too_large"


class SlowBodyError(RequestError):
    """The request's body does not arrive."""

    status = 408
    code = "request_timeout"


class LimitedApp:
    """An ASGI application whose requests are no larger and no slower than the limits.

    What is wrong with headers is answered here. What is wrong with a body is raised where the application reads it, so
    that the refusal has the shape of the application's own errors.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # What is wrong with a WebSocket's headers has been answered before it became one.
            await self._app(scope, receive, send)
            return
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > self._limits.headers or size > self._limits.header_bytes:
            await _refuse_headers(send, self._limits)
            return
        body = _Body(receive, headers, self._limits)

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                await body.drop_rest()
            await send(message)

        await self._app(scope, body.receive, send_last if _is_last(scope) else send)


class _Body:
    """The receiving end of one request."""

    def __init__(self, receive: Receive, headers: Sequence[tuple[bytes, bytes]], limits: Limits) -> None:
        self._receive = receive
        self._limits = limits
        self._announced = next((value for name, value in headers if name == b"content-length"), b"0")
        self._received = 0
        self._complete = False
        self._deadline = asyncio.get_running_loop().time() + limits.body_timeout_s

    async def receive(self) -> Message:
        """Raises BodyTooLargeError or SlowBodyError in place of a part of the body."""
        if self._complete:
            return await self._receive()
        # The HTTP parser has refused a length that is no number.
        self._check_size(int(self._announced))
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise SlowBodyError(
                f"the request's body did not arrive within {self._limits.body_timeout_s:g} s "
                f"({self._received} bytes came); send it faster or make it smaller"
            ) from None
        self._received += len(message.get("body", b""))
        self._check_size(self._received)
        self._complete = not message.get("more_body", False)
        return message

    async def drop_rest(self) -> None:
        """Reads what has not been read, for a while. The connection is about to be closed, and closing it over a client
        that still sends would reset it: the client would never see its answer."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not self._complete:
                    self._complete = not (await self._receive()).get("more_body", False)

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise BodyTooLargeError(
                f"the request's body has at least {size} bytes, at most {self._limits.body_bytes} are taken; "
                "shorten the history, or raise --max-body-mb of `upspiral serve`"
            )


def _is_last(scope: Scope) -> bool:
    """Whether the connection ends with this request. A client that waits to be told to go on sends no body."""
    headers = [(name, value.lower()) for name, value in scope["headers"] if name in (b"connection", b"expect")]
    closes = scope["http_version"] == "1.0" or any(
        name == b"connection" and b"close" in value for name, value in headers
    )
    return closes and not any(name == b"expect" for name, _ in headers)


def headers_refused(limits: Limits) -> bytes:
    return refusal(
        f"the request's headers are more than {limits.headers} or larger than {limits.header_bytes} bytes together; "
        "send fewer or shorter ones",
        "headers_too_large",
    )


def refusal(message: str, code: str) -> bytes:
    """An error body that the SDKs of OpenAI and of Anthropic both read, for whom no dialect has been chosen yet."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return json.dumps({"type": "error", "error": error}).encode()


async def _refuse_headers(send: Send, limits: Limits) -> None:
    body = headers_refused(limits)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 431, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
