"""Calls to responses and their events.

Event order: response.created, response.in_progress, then for each item its added, parts, deltas and done events, then
response.completed, response.incomplete or response.failed. Sources: the OpenAI API reference and the Open Responses
specification, which also asks for a last `[DONE]`.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from upspiral.gateway.call import Call
from upspiral.gateway.dialects.base import Failure, RolloutDesk, WireEvent
from upspiral.gateway.dialects.openai_responses.items import Item
from upspiral.gateway.dialects.openai_responses.stored import Shelves, StoredResponse, keep_call
from upspiral.gateway.dialects.openai_responses.tools import CallItem, OfferedTools, call_item
from upspiral.gateway.dialects.pieces import ThinkingCount, carried, joined_pieces
from upspiral.gateway.generation import AnswerEvent
from upspiral.gateway.request import AnswerRequest
from upspiral.rendering.answer import CallPiece, Piece, TextPiece, ThinkingPiece
from upspiral.types import SamplingParams, ToolCall

Emit = Callable[..., None]
"""emit(event name, **fields)"""


@dataclass(frozen=True, slots=True)
class ThinkingForm:
    """Where the thinking of an answer is written down. It always stands in the item's content."""

    summary: bool
    """The request asked for summaries; ours is the text itself."""
    encrypted: bool
    """The request asked for reasoning.encrypted_content, because its client sends nothing else back."""


@dataclass(frozen=True, slots=True)
class ResponsesExchange:
    """A request for a response: what to answer, and how to write the answer down."""

    request: AnswerRequest
    stream: bool
    tools: OfferedTools
    thinking: ThinkingForm
    repeated: Mapping[str, Any]
    """What the response repeats of the request."""
    inputs: Sequence[Item]
    store: bool
    shelves: Shelves
    desk: RolloutDesk
    end: Sequence[WireEvent] = (("", b"[DONE]"),)
    """What comes behind the last event. A stream says that it is over; a socket is not over."""

    def body(self, call: Call, events: Sequence[AnswerEvent]) -> Mapping[str, Any]:
        names = _ItemNames()
        output = [self.item(piece, names.next()) for piece in joined_pieces(events)]
        count = ThinkingCount()
        for event in events:
            count.take(event)
        return self.finished(call, new_response_id(), output, count.tokens)

    def writer(self, call: Call) -> _EventWriter:
        return _EventWriter(self, call)

    def item(self, piece: Piece, name: str) -> dict[str, Any]:
        """A complete item."""
        if isinstance(piece, CallPiece):
            return self.call(piece.call, name).item
        if isinstance(piece, TextPiece):
            return {**_message(name), "status": "completed", "content": [_text_part(piece.text)]}
        item = {**_reasoning(name), "status": "completed", "content": [_reasoning_part(piece.text)]}
        if self.thinking.summary:
            item["summary"] = [_summary_part(piece.text)]
        if self.thinking.encrypted:
            item["encrypted_content"] = carried("thinking", piece.text)
        return item

    def call(self, call: ToolCall, name: str) -> CallItem:
        made = call_item(call, self.tools, name)
        keep_call(self.desk.memory, call, made.item)
        return made

    def finished(self, call: Call, name: str, output: list[dict[str, Any]], thinking_tokens: int) -> dict[str, Any]:
        """The response of a committed call, remembered if the request wants it."""
        cut = call.plan.generations[0].end == "length"
        if cut and output and output[-1]["type"] in ("message", "reasoning"):
            output[-1]["status"] = "incomplete"
        body = {
            **self.resource(call.plan.params[0], name, "incomplete" if cut else "completed"),
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": usage(call, thinking_tokens),
        }
        self.shelves.leave(StoredResponse(body, self.inputs), self.request, store=self.store)
        return body

    def resource(self, params: SamplingParams, name: str, status: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.desk.model_name,
            "output": [],
            "usage": None,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "store": self.store,
            **self.repeated,
        }


class _EventWriter:
    def __init__(self, exchange: ResponsesExchange, call: Call) -> None:
        self._exchange = exchange
        self._call = call
        self._params = call.plan.params[0]
        self._name = new_response_id()
        self._names = _ItemNames()
        self._output: list[dict[str, Any]] = []
        self._open: _OpenItem | None = None
        self._count = ThinkingCount()
        self._written: list[WireEvent] = []
        self._sequence = 0

    def opening(self) -> list[WireEvent]:
        # Encoded once: instructions and tools of an agent are tens of kilobytes.
        response = orjson.Fragment(orjson.dumps(self._exchange.resource(self._params, self._name, "in_progress")))
        self._emit("response.created", response=response)
        self._emit("response.in_progress", response=response)
        return self._taken()

    def event(self, event: AnswerEvent) -> list[WireEvent]:
        self._count.take(event)
        for piece in event.pieces:
            if isinstance(piece, CallPiece):
                self._close()
                self._call_item(self._exchange.call(piece.call, self._names.next()))
                continue
            if self._open is None or not isinstance(piece, self._open.kind):
                self._close()
                kind = _OpenText if isinstance(piece, TextPiece) else _OpenReasoning
                self._open = kind(self._exchange, self._names.next(), len(self._output), self._emit)
            self._open.add(piece.text)
        return self._taken()

    def closing(self) -> list[WireEvent]:
        cut = self._call.plan.generations[0].end == "length"
        self._close("incomplete" if cut else "completed")
        response = self._exchange.finished(self._call, self._name, self._output, self._count.tokens)
        self._emit(f"response.{response['status']}", response=response)
        return [*self._taken(), *self._exchange.end]

    def failure(self, failure: Failure) -> list[WireEvent]:
        self._close("incomplete")
        error = {"code": "server_error" if failure.status >= 500 else failure.code, "message": failure.message}
        response = self._exchange.resource(self._params, self._name, "failed")
        self._emit("response.failed", response={**response, "error": error, "output": self._output})
        return [*self._taken(), *self._exchange.end]

    def _call_item(self, call: CallItem) -> None:
        place = {"output_index": len(self._output)}
        self._emit("response.output_item.added", **place, item=call.opened)
        if call.delta is not None:
            place["item_id"] = call.item["id"]
            self._emit(f"{call.delta}.delta", **place, delta=call.text)
            self._emit(f"{call.delta}.done", **place, **{call.text_key: call.text}, **_call_name(call))
        self._finish_item(call.item)

    def _close(self, status: str = "completed") -> None:
        if self._open is not None:
            item = self._open.close(status)
            self._open = None
            self._finish_item(item)

    def _finish_item(self, item: dict[str, Any]) -> None:
        self._emit("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)

    def _emit(self, name: str, /, **fields: Any) -> None:
        self._written.append(wire_event(name, self._sequence, fields))
        self._sequence += 1

    def _taken(self) -> list[WireEvent]:
        written, self._written = self._written, []
        return written


class _OpenItem(ABC):
    """A message or reasoning item while its text arrives."""

    kind: type[TextPiece] | type[ThinkingPiece]

    def __init__(self, exchange: ResponsesExchange, name: str, index: int, emit: Emit) -> None:
        self._exchange = exchange
        self._name = name
        self._index = index
        self._emit = emit
        self._texts: list[str] = []
        opened = self._opened()
        self._place = {"item_id": opened["id"], "output_index": index}
        emit("response.output_item.added", output_index=index, item={**opened, "status": "in_progress"})
        self._open_parts()

    def add(self, text: str) -> None:
        self._texts.append(text)
        self._delta(text)

    def close(self, status: str) -> dict[str, Any]:
        """The complete item."""
        text = "".join(self._texts)
        self._close_parts(text)
        return {**self._exchange.item(self.kind(text), self._name), "status": status}

    @abstractmethod
    def _opened(self) -> dict[str, Any]: ...

    @abstractmethod
    def _open_parts(self) -> None: ...

    @abstractmethod
    def _delta(self, text: str) -> None: ...

    @abstractmethod
    def _close_parts(self, text: str) -> None: ...


class _OpenText(_OpenItem):
    kind = TextPiece

    def _opened(self) -> dict[str, Any]:
        return _message(self._name)

    def _open_parts(self) -> None:
        self._emit("response.content_part.added", **self._place, content_index=0, part=_text_part(""))

    def _delta(self, text: str) -> None:
        self._emit("response.output_text.delta", **self._place, content_index=0, delta=text, logprobs=[])

    def _close_parts(self, text: str) -> None:
        self._emit("response.output_text.done", **self._place, content_index=0, text=text, logprobs=[])
        self._emit("response.content_part.done", **self._place, content_index=0, part=_text_part(text))


class _OpenReasoning(_OpenItem):
    kind = ThinkingPiece

    def _opened(self) -> dict[str, Any]:
        return _reasoning(self._name)

    def _open_parts(self) -> None:
        self._emit("response.content_part.added", **self._place, content_index=0, part=_reasoning_part(""))
        if self._exchange.thinking.summary:
            self._emit("response.reasoning_summary_part.added", **self._place, summary_index=0, part=_summary_part(""))

    def _delta(self, text: str) -> None:
        self._emit("response.reasoning_text.delta", **self._place, content_index=0, delta=text)
        if self._exchange.thinking.summary:
            self._emit("response.reasoning_summary_text.delta", **self._place, summary_index=0, delta=text)

    def _close_parts(self, text: str) -> None:
        self._emit("response.reasoning_text.done", **self._place, content_index=0, text=text)
        self._emit("response.content_part.done", **self._place, content_index=0, part=_reasoning_part(text))
        if self._exchange.thinking.summary:
            self._emit("response.reasoning_summary_text.done", **self._place, summary_index=0, text=text)
            part = _summary_part(text)
            self._emit("response.reasoning_summary_part.done", **self._place, summary_index=0, part=part)


@dataclass(slots=True)
class _ItemNames:
    """Ids of a response's items: one random stem and a number."""

    stem: str = field(default_factory=lambda: secrets.token_hex(12))
    count: int = 0

    def next(self) -> str:
        self.count += 1
        return f"{self.stem}{self.count:02d}"


def wire_event(name: str, number: int, fields: Mapping[str, Any]) -> WireEvent:
    return name, orjson.dumps({"type": name, "sequence_number": number, **fields})


def usage(call: Call, thinking_tokens: int) -> dict[str, Any]:
    """Exactly the tokens that are recorded."""
    prompt, sampled = call.usage.prompt_tokens, call.usage.completion_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": sampled,
        "output_tokens_details": {"reasoning_tokens": thinking_tokens},
        "total_tokens": prompt + sampled,
    }


def new_response_id() -> str:
    return f"resp_{secrets.token_hex(16)}"


def _message(name: str) -> dict[str, Any]:
    return {"type": "message", "id": f"msg_{name}", "status": "in_progress", "role": "assistant", "content": []}


def _reasoning(name: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": [], "status": "in_progress"}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _reasoning_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _summary_part(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}


def _call_name(call: CallItem) -> dict[str, Any]:
    return {"name": call.item["name"]} if call.item["type"] == "function_call" else {}
