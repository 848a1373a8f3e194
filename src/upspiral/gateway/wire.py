"""HTTP around a call: reading bodies, failures, event streams, and noticing that a client left."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from upspiral.errors import (
    DeadlineError,
    EngineError,
    RequestError,
    StoreError,
    TemplateError,
    UpspiralError,
)
from upspiral.gateway.call import Call, HungUpError
from upspiral.gateway.dialects.base import Dialect, EventWriter, Failure, WireEvent
from upspiral.gateway.dialects.fields import FieldError
from upspiral.gateway.generation import AnswerEvent

KEEPALIVE_S = 5.0
"""An event stream is never silent for longer, so that no proxy or SDK gives it up."""

_STATUS_CODES: tuple[tuple[type[UpspiralError], int, str], ...] = (
    (TemplateError, 400, "template_error"),
    (DeadlineError, 504, "deadline"),
    (EngineError, 500, "engine_error"),
    (StoreError, 500, "store_error"),
)
_COMMENT = b": keepalive\n\n"
_MOST_NESTED = 250
"""Levels of objects and lists that orjson is sure to write. It reads four times as many."""


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


async def json_body(request: Request) -> dict[str, Any]:
    """The body as an object. Raises RequestError when it is not one."""
    return json_object(await raw_body(request))


async def raw_body(request: Request) -> bytes:
    """How large and how late it may be is held by `LimitedApp`, which raises where the body is read."""
    try:
        return await request.body()
    except ClientDisconnect:
        raise HungUpError("the client left before it had sent its request") from None


def json_object(raw: bytes) -> dict[str, Any]:
    """Raises RequestError when the text is not a JSON object, or nested deeper than answers that repeat a part of it
    can be written."""
    try:
        value = orjson.loads(raw)
    except ValueError as error:
        raise RequestError(f"the request's body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"the request's body must be a JSON object, not {type(value).__name__}")
    _check_depth(raw, value)
    return value


def _check_depth(raw: bytes, value: dict[str, Any]) -> None:
    """Raises FieldError for what was read and could not be written again: tools and items go back to the client."""
    if raw.count(b"{") + raw.count(b"[") < _MOST_NESTED or _is_writable(value):
        return
    field = next((name for name, each in value.items() if not _is_writable({name: each})), "the body")
    raise FieldError(field[:80], f"is nested deeper than {_MOST_NESTED} levels; flatten it")


def _is_writable(value: Any) -> bool:
    """What goes back stands some levels deeper there: an event holds a response, which holds the item."""
    try:
        orjson.dumps([[[[value]]]])
    except TypeError:
        return False
    return True


def request_headers(request: HTTPConnection) -> dict[str, str]:
    """By lower-case name. Starlette's own mapping searches the whole list at each look-up."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in request.scope["headers"]}


def failure_of(error: Exception) -> Failure:
    """How any error, ours or not, looks from outside. Where one of ours came from is forgotten: a call keeps its error,
    the error its frames, and the frames the call and all of its rollout."""
    request_id = new_request_id()
    if isinstance(error, UpspiralError):
        error.__traceback__ = error.__cause__ = error.__context__ = None
    if isinstance(error, HTTPException):
        return Failure(error.status_code, "http_error", error.detail, request_id=request_id)
    if isinstance(error, RequestError):
        field = error.field if isinstance(error, FieldError) else None
        return Failure(error.status, error.code, str(error), field, request_id)
    if isinstance(error, RecursionError):
        return Failure(400, "invalid_request", "the request's body is nested too deeply", request_id=request_id)
    for kind, status, code in _STATUS_CODES:
        if isinstance(error, kind):
            return Failure(status, code, str(error), request_id=request_id)
    return Failure(500, "internal", "the gateway has a bug; see its log", request_id=request_id)


def failure_response(failure: Failure, dialect: Dialect) -> Response:
    # SDKs repeat 409 and 5xx by themselves. Here a repetition could only waste a model call.
    headers = {"x-should-retry": "false", dialect.request_id_header: failure.request_id}
    return json_response(dialect.error(failure), failure.status, headers)


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


async def finished_events(call: Call, request: Request) -> Sequence[AnswerEvent]:
    """All events of a call, once it is committed; a client that leaves cancels it. Raises the call's error."""
    gone = asyncio.create_task(_disconnection(request.receive))
    try:
        # No deadline of its own: the call has one for each of the engine's chunks.
        await asyncio.wait([call.task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not call.task.done():
            raise HungUpError("the client left before the answer was complete")
    finally:
        leave(call)
        gone.cancel()
    return [event async for event in call.events()]


def leave(call: Call) -> None:
    """Nobody reads this call's answer here any more. The last reader to leave cancels it, if it is not complete."""
    call.leave(HungUpError("the client left before the answer was complete"))


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


SendEvents = Callable[[Sequence[WireEvent], bool], Awaitable[None]]
"""send(events, whether more come)"""


async def write_events(call: Call, writer: EventWriter, send: SendEvents) -> Failure | None:
    """Sends the opening at once, then each event as its text is certain. Returns what broke and became the last one."""
    failure = None
    await send(writer.opening(), True)
    try:
        async for event in call.events():
            if written := writer.event(event):
                await send(written, True)
        last = writer.closing()
    except UpspiralError as error:
        failure = failure_of(error)
        last = writer.failure(failure)
    await send(last, False)
    return failure


class AnswerStream(Response):
    """Server-sent events of a call: the opening at once, then each event as its text is certain.

    A client that leaves cancels the call. What breaks after the first byte becomes the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, writer: EventWriter, dialect: Dialect) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", dialect.request_id_header: new_request_id()}
        super().__init__(headers=headers)
        # The length is not known.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._call = call
        self._writer = writer
        self._keepalive = _COMMENT if dialect.keepalive is None else framed([dialect.keepalive])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _Sender(send)
        writing = asyncio.create_task(self._write(send, sender))
        gone = asyncio.create_task(_disconnection(receive))
        try:
            while not await _any_done([writing, gone], KEEPALIVE_S / 2):
                if sender.was_silent():
                    await sender.send(self._keepalive)
        finally:
            leave(self._call)
            gone.cancel()
            if not writing.done():
                writing.cancel()
        if writing.done():
            writing.result()

    async def _write(self, send: Send, sender: _Sender) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def send_events(events: Sequence[WireEvent], more: bool) -> None:
            await sender.send(framed(events), more=more)

        await write_events(self._call, self._writer, send_events)


class _Sender:
    """Sends pieces of a body and remembers whether it did."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._sending = 0
        self._used = False

    async def send(self, body: bytes, *, more: bool = True) -> None:
        self._used = True
        self._sending += 1
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        finally:
            self._sending -= 1

    def was_silent(self) -> bool:
        """Whether nothing was sent, or still waits for a slow reader, since this was asked before."""
        silent = not self._used and not self._sending
        self._used = False
        return silent


async def _any_done(tasks: Sequence[asyncio.Task[None]], timeout_s: float) -> bool:
    done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


def framed(events: Sequence[WireEvent]) -> bytes:
    """As server-sent events."""
    lines: list[bytes] = []
    for name, data in events:
        lines.append(b"event: %b\ndata: %b\n\n" % (name.encode(), data) if name else b"data: %b\n\n" % data)
    return b"".join(lines)
