"""Anthropic Messages: calls to messages and stream events, and the shape of errors."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from upspiral.errors import ContextLengthError
from upspiral.gateway.call import Call
from upspiral.gateway.dialects.base import Failure, RolloutDesk, WireEvent
from upspiral.gateway.dialects.pieces import carried, joined_pieces, met_stop_string
from upspiral.gateway.generation import AnswerEvent
from upspiral.gateway.request import AnswerRequest
from upspiral.rendering.answer import CallPiece, Piece, TextPiece, ThinkingPiece

ThinkingDisplay = Literal["shown", "omitted", "hidden"]
"""Shown: blocks with their text. Omitted: blocks without text, which travels in the signature. Hidden: no blocks."""

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True, slots=True)
class MessagesExchange:
    """A request for a message: what to answer, and how to write the answer down."""

    request: AnswerRequest
    stream: bool
    thinking: ThinkingDisplay
    desk: RolloutDesk

    def body(self, call: Call, events: Sequence[AnswerEvent]) -> Mapping[str, Any]:
        content = [self.block(piece) for piece in joined_pieces(events) if self.shows(piece)]
        return {**self.envelope(), "content": content, **self.stopped(call), "usage": usage(call)}

    def writer(self, call: Call) -> _EventWriter:
        return _EventWriter(self, call)

    def envelope(self) -> dict[str, Any]:
        name = f"msg_{secrets.token_hex(12)}"
        return {"id": name, "type": "message", "role": "assistant", "model": self.desk.model_name}

    def shows(self, piece: Piece) -> bool:
        return self.thinking != "hidden" or not isinstance(piece, ThinkingPiece)

    def block(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, CallPiece):
            return {**_opened(piece), "input": orjson.Fragment(piece.call.arguments)}
        if isinstance(piece, TextPiece):
            return {"type": "text", "text": piece.text}
        shown = piece.text if self.thinking == "shown" else ""
        return {"type": "thinking", "thinking": shown, "signature": self.signature(piece.text)}

    def signature(self, thinking: str) -> str:
        """Says that the thinking is ours. Nothing depends on it unless it carries the text: tokens decide."""
        if self.thinking == "omitted":
            return carried("thinking", thinking)
        return f"up1.{hashlib.blake2b(thinking.encode(), digest_size=16).hexdigest()}"

    def stopped(self, call: Call) -> dict[str, Any]:
        generation = call.plan.generations[0]
        stop_string = None
        if generation.end == "stop":
            stop_string = met_stop_string(generation, self.request.stop_strings, self.desk.decode)
        reason = "stop_sequence" if stop_string else _STOP_REASONS[generation.end or "stop"]
        return {"stop_reason": reason, "stop_sequence": stop_string}


class _EventWriter:
    """message_start, ping, then for each block start, deltas and stop, then message_delta and message_stop."""

    def __init__(self, exchange: MessagesExchange, call: Call) -> None:
        self._exchange = exchange
        self._call = call
        self._open: Piece | None = None
        """The first piece of the block that is being written."""
        self._thinking: list[str] = []
        self._blocks = 0

    def opening(self) -> list[WireEvent]:
        stop = {"stop_reason": None, "stop_sequence": None}
        message = {
            **self._exchange.envelope(),
            "content": [],
            **stop,
            "usage": {**usage(self._call), "output_tokens": 0},
        }
        return [_event("message_start", message=message), _event("ping")]

    def event(self, event: AnswerEvent) -> list[WireEvent]:
        written: list[WireEvent] = []
        for piece in event.pieces:
            if not self._exchange.shows(piece):
                continue
            if type(piece) is not type(self._open) or isinstance(piece, CallPiece):
                written += self._close()
                self._open = piece
                written.append(_event("content_block_start", index=self._blocks, content_block=_opened(piece)))
            written += self._delta(piece)
        return written

    def closing(self) -> list[WireEvent]:
        end = _event("message_delta", delta=self._exchange.stopped(self._call), usage=usage(self._call))
        return [*self._close(), end, _event("message_stop")]

    def failure(self, failure: Failure) -> list[WireEvent]:
        return [("error", orjson.dumps(anthropic_error(failure)))]

    def _delta(self, piece: Piece) -> list[WireEvent]:
        if isinstance(piece, TextPiece):
            return [self._block_delta(type="text_delta", text=piece.text)]
        if isinstance(piece, CallPiece):
            return [self._block_delta(type="input_json_delta", partial_json=piece.call.arguments)]
        self._thinking.append(piece.text)
        if self._exchange.thinking == "omitted":
            return []
        return [self._block_delta(type="thinking_delta", thinking=piece.text)]

    def _close(self) -> list[WireEvent]:
        if self._open is None:
            return []
        written: list[WireEvent] = []
        if isinstance(self._open, ThinkingPiece):
            signature = self._exchange.signature("".join(self._thinking))
            written.append(self._block_delta(type="signature_delta", signature=signature))
            self._thinking = []
        written.append(_event("content_block_stop", index=self._blocks))
        self._open = None
        self._blocks += 1
        return written

    def _block_delta(self, **delta: str) -> WireEvent:
        return _event("content_block_delta", index=self._blocks, delta=delta)


def usage(call: Call) -> dict[str, int]:
    """Exactly the tokens that are recorded."""
    return {
        "input_tokens": call.usage.prompt_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": call.usage.completion_tokens,
    }


def anthropic_error(failure: Failure) -> Mapping[str, Any]:
    """The body of an error, also the data of the event that ends a stream which breaks."""
    kind = _ERROR_TYPES.get(failure.status, "invalid_request_error" if failure.status < 500 else "api_error")
    message = failure.message
    if failure.code == ContextLengthError.code:
        # By these words clients know that their history must be shortened.
        message = f"prompt is too long: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": failure.request_id}


def _opened(piece: Piece) -> dict[str, Any]:
    """A block before its first delta."""
    if isinstance(piece, CallPiece):
        return {"type": "tool_use", "id": piece.call.id, "name": piece.call.name, "input": {}}
    if isinstance(piece, TextPiece):
        return {"type": "text", "text": ""}
    return {"type": "thinking", "thinking": "", "signature": ""}


def _event(name: str, /, **fields: Any) -> WireEvent:
    return name, orjson.dumps({"type": name, **fields})
