"""OpenAI chat completions: request bodies to AnswerRequest, calls to responses and stream chunks.

Source: the OpenAI API reference of /v1/chat/completions. What would change the answer and is not supported is refused,
never ignored; fields without influence on sampling (user, metadata, store ...) are let through. Thinking travels as
`reasoning_content`, as vLLM and DeepSeek serve it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from upspiral.gateway.call import Call
from upspiral.gateway.dialects.base import Failure, RolloutDesk, WireEvent
from upspiral.gateway.dialects.fields import (
    FieldError,
    arguments_field,
    choice_field,
    flag_field,
    list_field,
    number_field,
    object_field,
    optional_text,
    refuse_unsupported,
    shown,
    text_field,
    whole_field,
)
from upspiral.gateway.dialects.openai_shapes import model_entry, model_list, openai_error
from upspiral.gateway.dialects.reread import read_entries
from upspiral.gateway.dialects.tool_choice import allowed_tools, named_choice, simple_choice
from upspiral.gateway.generation import AnswerEnd, AnswerEvent, Generation
from upspiral.gateway.request import AnswerRequest, ToolChoice
from upspiral.rendering.answer import CallPiece, Piece, TextPiece
from upspiral.types import Message, Role, ToolCall, ToolSpec

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_MOST_ANSWERS = 128
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Fields that we do not support, with the values that ask for nothing."""
_DEPRECATED = {"functions": "tools", "function_call": "tool_choice"}


class OpenAIChat:
    """The dialect of /v1/chat/completions."""

    mark = ""
    request_id_header = "x-request-id"
    keepalive = None
    lookups = ()

    def __init__(self) -> None:
        self.answers = {"/v1/chat/completions": read_exchange}
        self.channels = {}

    def error(self, failure: Failure) -> Mapping[str, Any]:
        return openai_error(failure)

    def model(self, model_id: str) -> Mapping[str, Any]:
        return model_entry(model_id)

    def models(self, model_ids: Sequence[str]) -> Mapping[str, Any]:
        return model_list(model_ids)


@dataclass(frozen=True, slots=True)
class ChatExchange:
    """A chat completion request: what to answer, and how to write the answer down."""

    request: AnswerRequest
    stream: bool
    include_usage: bool
    logprobs: bool
    desk: RolloutDesk

    def body(self, call: Call, events: Sequence[AnswerEvent]) -> Mapping[str, Any]:
        del events  # a chat message has one place for text, whatever stood between its calls
        choices: list[dict[str, Any]] = []
        errors: list[str] = []
        for generation in call.plan.generations:
            answer = generation.answer()
            errors.extend(answer.errors)
            message = _wire_message(answer.message)
            logprobs = _logprobs(generation, 0, len(generation.token_ids), self.desk) if self.logprobs else None
            choices.append(
                {
                    "index": generation.index,
                    "message": message,
                    "finish_reason": generation.end,
                    "logprobs": logprobs,
                }
            )
        body = {**_envelope("chat.completion", self.desk.model_name), "choices": choices, "usage": _usage(call)}
        return _with_errors(body, errors)

    def writer(self, call: Call) -> _ChunkWriter:
        return _ChunkWriter(self, call)


def read_exchange(body: Mapping[str, Any], desk: RolloutDesk) -> ChatExchange:
    """Raises RequestError naming the field that is wrong."""
    for key, instead in _DEPRECATED.items():
        if body.get(key):
            raise FieldError(key, f"is the deprecated form of {instead}, which is supported; use {instead}")
    refuse_unsupported(body, _NEUTRAL)
    stream_options = object_field(body, "stream_options", "")
    return ChatExchange(
        request=_request(body, desk),
        stream=flag_field(body, "stream", False),
        include_usage=flag_field(stream_options, "include_usage", False, "stream_options"),
        logprobs=flag_field(body, "logprobs", False),
        desk=desk,
    )


def _request(body: Mapping[str, Any], desk: RolloutDesk) -> AnswerRequest:
    messages = read_entries(list_field(body, "messages", ""), "messages", _read_entry, desk.readings)
    if not messages:
        raise FieldError("messages", "must be a list with at least one message")
    tools = tuple(_tool(entry, f"tools[{i}]") for i, entry in enumerate(list_field(body, "tools", "")))
    choice, tools = _tool_choice(body, tools)
    return AnswerRequest(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=flag_field(body, "parallel_tool_calls", True),
        answers=whole_field(body, "n", least=1, most=_MOST_ANSWERS) or 1,
        stop_strings=_stop_strings(body.get("stop")),
        max_tokens=whole_field(body, "max_completion_tokens", least=1) or whole_field(body, "max_tokens", least=1),
        temperature=number_field(body, "temperature", least=0),
        top_p=number_field(body, "top_p", least=1e-6, most=1),
        # vLLM's extensions; of top_k, -1 means all.
        top_k=whole_field(body, "top_k", least=-1),
        min_p=number_field(body, "min_p", least=0, most=1),
        seed=whole_field(body, "seed", least=-(2**63)),
        model=optional_text(body, "model"),
    )


def _read_entry(entry: Mapping[str, Any], where: str) -> tuple[Message]:
    return (_message(entry, where),)


def _message(entry: Mapping[str, Any], where: str) -> Message:
    role = _ROLES.get(str(entry.get("role")))
    if role is None:
        raise FieldError(f"{where}.role", f"is {shown(entry.get('role'))}; known roles are {', '.join(_ROLES)}")
    text = _text(entry.get("content"), where)
    if role == "tool":
        return Message(role, text, tool_call_id=text_field(entry, "tool_call_id", where))
    if role != "assistant":
        if entry.get("content") is None:
            raise FieldError(f"{where}.content", "is missing")
        return Message(role, text)
    if entry.get("function_call") is not None:
        raise FieldError(f"{where}.function_call", "is not supported; use tool_calls")
    refusal = optional_text(entry, "refusal", where)
    calls = tuple(
        _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(list_field(entry, "tool_calls", where))
    )
    return Message(role, text or refusal, optional_text(entry, "reasoning_content", where) or None, calls)


def _text(content: Any, where: str) -> str:
    """A string, or parts of text that are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise FieldError(f"{where}.content", f"must be a string or a list of text parts, not {shown(content)}")
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise FieldError(f"{where}.content[{index}]", f"is {shown(part)}; only text parts are supported")
        texts.append(text)
    return "".join(texts)


def _tool_call(entry: Mapping[str, Any], where: str) -> ToolCall:
    _check_function(entry, where, "calls of functions")
    function, place = object_field(entry, "function", where), f"{where}.function"
    name = text_field(function, "name", place)
    return ToolCall(text_field(entry, "id", where), name, arguments_field(function, "arguments", place))


def _tool(entry: Mapping[str, Any], where: str) -> ToolSpec:
    _check_function(entry, where, "functions")
    function, place = object_field(entry, "function", where), f"{where}.function"
    parameters = object_field(function, "parameters", place)
    return ToolSpec(text_field(function, "name", place), optional_text(function, "description", place), parameters)


def _check_function(entry: Mapping[str, Any], where: str, supported: str) -> None:
    kind = entry.get("type", "function")
    if kind != "function":
        raise FieldError(f"{where}.type", f"is {shown(kind)}; only {supported} are supported")


def _tool_choice(body: Mapping[str, Any], tools: tuple[ToolSpec, ...]) -> tuple[ToolChoice, tuple[ToolSpec, ...]]:
    """The choice, and the tools that the model may know of."""
    value = body.get("tool_choice")
    if (simple := simple_choice(value, tools)) is not None:
        return simple, tools
    choice: Mapping[str, Any] = value if isinstance(value, dict) else {}
    kind = choice.get("type")
    if kind == "function":
        name = text_field(object_field(choice, "function", "tool_choice"), "name", "tool_choice.function")
        return named_choice(name, tools, "tool_choice.function.name"), tools
    if kind != "allowed_tools":
        raise FieldError(
            "tool_choice",
            f'= {shown(value)} is not supported; use "auto", "none", "required", a function or allowed_tools',
        )
    where = "tool_choice.allowed_tools"
    allowed = object_field(choice, "allowed_tools", "tool_choice")
    mode = choice_field(allowed, "mode", ("auto", "required"), where)
    entries = list_field(allowed, "tools", where)
    names = [
        text_field(object_field(entry, "function", f"{where}.tools[{i}]"), "name", f"{where}.tools[{i}].function")
        for i, entry in enumerate(entries)
    ]
    tools = allowed_tools(names, tools, f"{where}.tools")
    return ToolChoice("required" if mode == "required" else "auto"), tools


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value or []
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        raise FieldError("stop", f"must be a non-empty string or a list of them, not {shown(value)}")
    return tuple(strings)


class _ChunkWriter:
    """Chunks in the order of the API: a role for each answer, deltas, a finish reason for each answer, usage."""

    def __init__(self, exchange: ChatExchange, call: Call) -> None:
        envelope = _envelope("chat.completion.chunk", exchange.desk.model_name)
        self._envelope = {**envelope, "usage": None} if exchange.include_usage else envelope
        self._exchange = exchange
        self._call = call
        self._tool_calls = [0] * exchange.request.answers
        self._has_text = [False] * exchange.request.answers
        self._tokens = [0] * exchange.request.answers

    def opening(self) -> list[WireEvent]:
        # What the content will be is not known yet: an answer of calls alone has none.
        first = {"role": "assistant", "content": None}
        return [self._chunk(index, first) for index in range(self._exchange.request.answers)]

    def event(self, event: AnswerEvent) -> list[WireEvent]:
        deltas = [self._delta(event.answer, piece) for piece in event.pieces]
        entries = self._entries(event) if self._exchange.logprobs and event.tokens else None
        if entries and not deltas:
            deltas = [{}]
        # All log-probabilities of an event go with its first delta: the text of some is still held back.
        written = [self._chunk(event.answer, delta, entries if i == 0 else None) for i, delta in enumerate(deltas)]
        if not event.end:
            return written
        last = {} if self._tool_calls[event.answer] or self._has_text[event.answer] else {"content": ""}
        return [*written, self._chunk(event.answer, last, end=event.end)]

    def closing(self) -> list[WireEvent]:
        usage = {**self._envelope, "choices": [], "usage": _usage(self._call)}
        last = [("", orjson.dumps(usage))] if self._exchange.include_usage else []
        return [*last, ("", b"[DONE]")]

    def failure(self, failure: Failure) -> list[WireEvent]:
        return [("", orjson.dumps(openai_error(failure)))]

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, end: AnswerEnd | None = None
    ) -> WireEvent:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}
        errors = self._call.plan.generations[index].answer().errors if end else ()
        return "", orjson.dumps(_with_errors({**self._envelope, "choices": [choice]}, errors))

    def _entries(self, event: AnswerEvent) -> dict[str, Any]:
        start = self._tokens[event.answer]
        self._tokens[event.answer] += event.tokens
        generation = self._call.plan.generations[event.answer]
        return _logprobs(generation, start, start + event.tokens, self._exchange.desk)

    def _delta(self, answer: int, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, CallPiece):
            index = self._tool_calls[answer]
            self._tool_calls[answer] += 1
            return {"tool_calls": [{"index": index, **_wire_call(piece.call)}]}
        if isinstance(piece, TextPiece):
            self._has_text[answer] = True
            return {"content": piece.text}
        return {"reasoning_content": piece.text}


def _wire_message(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": "assistant", "content": message.text, "refusal": None}
    if message.thinking is not None:
        body["reasoning_content"] = message.thinking
    if message.tool_calls:
        body["content"] = message.text or None
        body["tool_calls"] = [_wire_call(call) for call in message.tool_calls]
    return body


def _wire_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(generation: Generation, start: int, stop: int, desk: RolloutDesk) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    for index in range(start, stop):
        text = desk.decode([generation.token_ids[index]])
        logprob = float(generation.logprobs[index])
        entries.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": entries, "refusal": None}


def _with_errors(body: dict[str, Any], errors: Sequence[str]) -> dict[str, Any]:
    """An extension: clients ignore it, and whoever debugs an agent sees why a tool call arrived as text."""
    return {**body, "upspiral": {"parse_errors": list(errors)}} if errors else body


def _usage(call: Call) -> dict[str, int]:
    """Exactly the tokens that are recorded."""
    prompt, sampled = call.usage.prompt_tokens, call.usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _envelope(kind: str, model_name: str) -> dict[str, Any]:
    created = int(time.time())
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": created, "model": model_name}
