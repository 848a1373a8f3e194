"""HTTP around a call: reading bodies, errors in OpenAI's shape, event streams, and noticing that a client left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
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

BODY_DEADLINE_S = 60.0
"""How long a client may take to send its request."""
KEEPALIVE_S = 10.0
"""An event stream is never silent for longer, so that no proxy or SDK gives it up."""

_STATUS_CODES: tuple[tuple[type[UpspiralError], int, str], ...] = (
    (TemplateError, 400, "template_error"),
    (DeadlineError, 504, "deadline"),
    (EngineError, 500, "engine_error"),
    (StoreError, 500, "store_error"),
)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


async def json_body(request: Request) -> dict[str, Any]:
    """The body as an object. Raises RequestError when it is not one or does not arrive in time."""
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            raw = await request.body()
    except TimeoutError:
        raise RequestError(f"the request's body did not arrive within {BODY_DEADLINE_S:g} s") from None
    except ClientDisconnect:
        raise HungUpError("the client left before it had sent its request") from None
    try:
        value = orjson.loads(raw)
    except ValueError as error:
        raise RequestError(f"the request's body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"the request's body must be a JSON object, not {type(value).__name__}")
    return value


def status_and_code(error: UpspiralError) -> tuple[int, str]:
    if isinstance(error, RequestError):
        return error.status, error.code
    return next(((status, code) for kind, status, code in _STATUS_CODES if isinstance(error, kind)), (500, "internal"))


def error_body(message: str, status: int, code: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def error_response(request: Request, error: Exception) -> Response:
    """For Starlette's exception handlers: every error, ours or not, in OpenAI's shape."""
    del request
    if isinstance(error, HTTPException):
        return json_response(error_body(error.detail, error.status_code, "http_error"), error.status_code)
    if isinstance(error, UpspiralError):
        status, code = status_and_code(error)
        # SDKs repeat 409 and 5xx by themselves. Here a repetition could only waste a model call.
        return json_response(error_body(str(error), status, code), status, {"x-should-retry": "false"})
    return json_response(error_body("the gateway has a bug; see its log", 500, "internal"), 500)


async def wait_for_answer(call: Call, request: Request) -> None:
    """Returns when the call is committed; a client that leaves cancels it. Raises the call's error."""
    gone = asyncio.create_task(_disconnection(request))
    try:
        # No deadline of its own: the call has one for each of the engine's chunks.
        await asyncio.wait([call.task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not call.task.done():
            raise HungUpError("the client left before the answer was complete")
    finally:
        call.cancel(HungUpError("the request was abandoned"))
        gone.cancel()
    if call.error is not None:
        raise call.error


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(StreamingResponse):
    """Server-sent events of a call's chunks. Whatever ends the response early cancels the call."""

    def __init__(self, call: Call, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(_events(chunks), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.cancel(HungUpError("the client left before the answer was complete"))


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Frames chunks and keeps the connection alive in between. An error becomes the last event."""
    coming: asyncio.Task[bytes] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(chunks))  # pyright: ignore[reportArgumentType]
            done, _ = await asyncio.wait([coming], timeout=KEEPALIVE_S)
            if not done:
                yield b": keepalive\n\n"
                continue
            finished, coming = coming, None
            yield b"data: " + finished.result() + b"\n\n"
    except StopAsyncIteration:
        yield b"data: [DONE]\n\n"
    except UpspiralError as error:
        yield b"data: " + orjson.dumps(error_body(str(error), *status_and_code(error))) + b"\n\n"
    finally:
        if coming is not None:
            coming.cancel()
