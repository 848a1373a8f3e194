"""A WebSocket of the Responses API: each message asks for a response, whose events come back as messages.

Its messages are POST's bodies with a type, and the events are those of a stream. What is its own: a response with
store=false can be continued on the socket that made it, until a continuation of it fails; and `generate: false` takes
in the input and samples nothing. Sources: the Open Responses specification of 2026-04-24 and Codex's client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from upspiral.gateway.dialects.base import Exchange, Failure, RolloutDesk, WireEvent
from upspiral.gateway.dialects.fields import FieldError, flag_field, object_field, shown
from upspiral.gateway.dialects.memory import Memory
from upspiral.gateway.dialects.openai_responses.answer import ResponsesExchange, new_response_id, wire_event
from upspiral.gateway.dialects.openai_responses.stored import StoredResponse, forget
from upspiral.gateway.dialects.openai_shapes import openai_error
from upspiral.types import SamplingParams

ReadRequest = Callable[[Mapping[str, Any], RolloutDesk, Memory], ResponsesExchange]
"""As for POST, with what the socket remembers."""
_CREATE, _PROCESSED = "response.create", "response.processed"
_STREAM_FIELDS = ("stream", "stream_options")
"""Of POST alone. Codex sends them here too."""
_NO_USAGE: Mapping[str, Any] = {
    "input_tokens": 0,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 0,
}


class ResponsesChannel:
    """Satisfies Channel."""

    def __init__(self, read: ReadRequest, desk: RolloutDesk) -> None:
        self._read = read
        self._desk = desk
        self._memory = Memory()
        self._continued = ""
        """The response that the last message goes on from."""

    def read(self, body: Mapping[str, Any]) -> Exchange | Sequence[WireEvent]:
        self._continued = str(body.get("previous_response_id") or "")
        if body.get("type") == _PROCESSED:
            # Codex says that it has taken a response in; nobody waits for a word on that.
            return ()
        if body.get("type") != _CREATE:
            raise FieldError("type", f"is {shown(body.get('type'))}; a message of a socket is a {_CREATE!r}")
        generate = flag_field(body, "generate", True)
        request = {key: value for key, value in body.items() if key not in _STREAM_FIELDS}
        exchange = replace(self._read(request, self._desk, self._memory), end=())
        return exchange if generate else _taken_in(exchange)

    def headers(self, body: Mapping[str, Any]) -> Mapping[str, str]:
        """Codex sends the headers of its requests as metadata."""
        said = object_field(body, "client_metadata", "")
        return {key.lower(): value for key, value in said.items() if isinstance(value, str)}

    def failure(self, failure: Failure) -> WireEvent:
        return "error", orjson.dumps({"type": "error", "status": failure.status, **openai_error(failure)})

    def failed(self) -> None:
        forget(self._memory, self._continued)


def _taken_in(exchange: ResponsesExchange) -> list[WireEvent]:
    """The events of a response that is remembered, and of which nothing was sampled."""
    given = exchange.request
    params = SamplingParams(
        0,
        temperature=1.0 if given.temperature is None else given.temperature,
        top_p=1.0 if given.top_p is None else given.top_p,
    )
    opened = exchange.resource(params, new_response_id(), "in_progress")
    ended = {**opened, "status": "completed", "completed_at": opened["created_at"], "usage": _NO_USAGE}
    exchange.shelves.leave(StoredResponse(ended, exchange.inputs), exchange.request, store=exchange.store)
    states = [("created", opened), ("in_progress", opened), ("completed", ended)]
    return [wire_event(f"response.{state}", number, {"response": each}) for number, (state, each) in enumerate(states)]
