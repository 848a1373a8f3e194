"""WebSockets around calls: many requests on one connection, one after the other, their events as text messages."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.types import Receive
from starlette.websockets import WebSocket, WebSocketDisconnect

from upspiral.errors import RequestError, SealedRolloutError, UpspiralError
from upspiral.gateway.call import Call
from upspiral.gateway.dialects.base import Channel, EventWriter, Failure, WireEvent
from upspiral.gateway.hints import Hints, hints_of
from upspiral.gateway.request import AnswerRequest
from upspiral.gateway.wire import failure_of, json_object, leave, request_headers, write_events

LIFETIME_S = 3600.0
"""After so long a client has to connect again, as the Responses API has it. No answer is cut off for that."""
MOST_WAITING, MOST_WAITING_BYTES = 16, 64 * 2**20
"""What a client may send ahead while it is being answered. Beyond that it is not read until there is room."""
_GOING_AWAY, _POLICY_VIOLATION = 1001, 1008
"""Why a connection is closed, as WebSockets number it."""

Begin = Callable[[AnswerRequest, Hints], Call]


class SocketAgeError(RequestError):
    """The connection is too old."""

    code = "websocket_connection_limit_reached"


class AnswerSocket:
    """One client's connection. A request that fails is an event, and the next one is taken; a client that leaves
    cancels its call."""

    def __init__(self, websocket: WebSocket, channel: Channel, begin: Begin, count: Callable[[int], None]) -> None:
        """`begin` starts a call; `count` is told the HTTP status that each request would have had."""
        self._websocket = websocket
        self._channel = channel
        self._begin = begin
        self._count = count
        self._headers = request_headers(websocket)

    async def run(self) -> None:
        """Until either side ends the connection."""
        await self._websocket.accept()
        inbox = _Inbox(self._websocket.receive)
        end = asyncio.get_running_loop().time() + LIFETIME_S
        try:
            while (message := await inbox.next(end)) is not None:
                await self._answer(message, inbox)
        except WebSocketDisconnect:
            pass  # it left while something was sent
        except SocketAgeError as error:
            await self._send([self._channel.failure(failure_of(error))])
            await self._websocket.close(_GOING_AWAY)
        except SealedRolloutError:
            await self._websocket.close(_POLICY_VIOLATION, "the rollout has ended")
        except Exception as error:  # boundary: a bug of ours is told to the client, and logged by the server
            await self._send([self._channel.failure(failure_of(error))])
            raise
        finally:
            inbox.close()

    async def _answer(self, message: Mapping[str, Any], inbox: _Inbox) -> None:
        """Raises SealedRolloutError, when it has been said, because no later request can be answered either."""
        try:
            body, digest = _read(message)
            read = self._channel.read(body)
            if isinstance(read, Sequence):
                self._count(200)
                await self._send(read)
                return
            # What the connection began with says nothing about one message: it does not make it a retry.
            hints = hints_of({**self._headers, **self._channel.headers(body)}, digest)
            call = self._begin(read.request, replace(hints, retry=0))
        except (UpspiralError, RecursionError) as error:
            failure = failure_of(error)
            self._channel.failed()
            self._count(failure.status)
            await self._send([self._channel.failure(failure)])
            if isinstance(error, SealedRolloutError):
                raise
            return
        self._count(200)
        if await self._deliver(call, read.writer(call), inbox) is not None:
            self._channel.failed()

    async def _deliver(self, call: Call, writer: EventWriter, inbox: _Inbox) -> Failure | None:
        """What broke the answer, of which the client knows."""
        writing = asyncio.create_task(write_events(call, writer, self._send))
        try:
            # No deadline of its own: the call has one for each of the engine's chunks.
            await asyncio.wait([writing, inbox.left], return_when=asyncio.FIRST_COMPLETED)
        finally:
            leave(call)
            if not writing.done():
                writing.cancel()
        return writing.result() if writing.done() else None

    async def _send(self, events: Sequence[WireEvent], more: bool = False) -> None:
        del more
        for _, data in events:
            await self._websocket.send({"type": "websocket.send", "text": data.decode()})


def _read(message: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The object that a message holds, and a digest of it."""
    text = message.get("text")
    if text is None:
        raise RequestError("a message must be JSON as text, not binary")
    raw = text.encode()
    return json_object(raw), hashlib.blake2b(raw, digest_size=16).digest()


class _Inbox:
    """What a client has sent and nobody has taken, and whether it has left. Reads all the time: a connection that is
    not read does not say that it was closed."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        """Something was put in or taken out."""
        self.left = asyncio.create_task(self._read())
        """Done when the client has left."""

    async def next(self, end: float) -> Mapping[str, Any] | None:
        """The oldest message; None when nobody is there any more. Raises SocketAgeError at `end`, a time of the event
        loop."""
        try:
            async with asyncio.timeout_at(end):
                while not self._waiting and not self.left.done():
                    await self._change()
        except TimeoutError:
            raise _too_old() from None
        if self.left.done():
            self.left.result()
            return None
        if asyncio.get_running_loop().time() >= end:
            raise _too_old()
        message = self._waiting.popleft()
        self._bytes -= _size(message)
        self._news.set()
        return message

    def close(self) -> None:
        self.left.cancel()

    async def _read(self) -> None:
        while (message := await self._receive())["type"] != "websocket.disconnect":
            self._waiting.append(message)
            self._bytes += _size(message)
            self._news.set()
            while len(self._waiting) >= MOST_WAITING or self._bytes > MOST_WAITING_BYTES:
                await self._change()
        self._news.set()

    async def _change(self) -> None:
        self._news.clear()
        await self._news.wait()


def _size(message: Mapping[str, Any]) -> int:
    return len(message.get("text") or message.get("bytes") or "")


def _too_old() -> SocketAgeError:
    return SocketAgeError(f"a connection is served for {LIFETIME_S:g} s; connect again and send the whole input")
