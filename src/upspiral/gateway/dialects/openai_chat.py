"""OpenAI chat completions: request bodies to AnswerRequest, calls to responses and stream chunks.

Source: the OpenAI API reference of /v1/chat/completions. What would change the answer and is not supported is refused,
never ignored; fields without influence on sampling (user, metadata, store ...) are let through.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from upspiral.errors import RequestError
from upspiral.gateway.call import Call
from upspiral.gateway.dialects.fields import (
    flag_field,
    list_field,
    number_field,
    object_field,
    shown,
    text_field,
    whole_field,
)
from upspiral.gateway.generation import AnswerEnd, AnswerEvent, Generation
from upspiral.gateway.request import AnswerRequest, ToolChoice
from upspiral.rendering.answer import CallPiece, TextPiece, ThinkingPiece
from upspiral.rendering.renderer import Renderer
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
    "function_call": (),
    "functions": ([],),
    "logit_bias": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Fields that we do not support, with the values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat completion request: what to answer, and how to write the answer down."""

    request: AnswerRequest
    stream: bool
    include_usage: bool
    logprobs: bool


def parse_request(body: Mapping[str, Any]) -> ChatRequest:
    """Raises RequestError naming the field that is wrong."""
    for key, neutral in _NEUTRAL.items():
        if body.get(key) is not None and body[key] not in neutral:
            raise RequestError(f"{key} = {shown(body[key])} is not supported; leave {key} out")
    messages = tuple(_message(entry, f"messages[{i}]") for i, entry in enumerate(list_field(body, "messages", "")))
    if not messages:
        raise RequestError("messages must be a list with at least one message")
    max_tokens = whole_field(body, "max_completion_tokens", least=1) or whole_field(body, "max_tokens", least=1)
    request = AnswerRequest(
        messages=messages,
        tools=tuple(_tool(entry, f"tools[{i}]") for i, entry in enumerate(list_field(body, "tools", ""))),
        tool_choice=_tool_choice(body.get("tool_choice")),
        parallel_tool_calls=flag_field(body, "parallel_tool_calls", True),
        answers=whole_field(body, "n", least=1, most=_MOST_ANSWERS) or 1,
        stop_strings=_stop_strings(body.get("stop")),
        max_tokens=max_tokens,
        temperature=number_field(body, "temperature", least=0),
        top_p=number_field(body, "top_p", least=1e-6, most=1),
        seed=whole_field(body, "seed", least=-(2**63)),
    )
    stream_options = object_field(body, "stream_options", "body")
    return ChatRequest(
        request=request,
        stream=flag_field(body, "stream", False),
        include_usage=flag_field(stream_options, "include_usage", False),
        logprobs=flag_field(body, "logprobs", False),
    )


def response(call: Call, chat: ChatRequest, renderer: Renderer, model_name: str) -> dict[str, Any]:
    """The body of a finished call's answer."""
    choices = []
    errors: list[str] = []
    for generation in call.plan.generations:
        answer = generation.answer()
        errors.extend(answer.errors)
        choice = {"index": generation.index, "message": _wire_message(answer.message), "finish_reason": generation.end}
        choice["logprobs"] = _logprobs(generation, 0, len(generation.token_ids), renderer) if chat.logprobs else None
        choices.append(choice)
    body = {**_envelope("chat.completion", model_name), "choices": choices, "usage": _usage(call)}
    # An extension: clients ignore it, and whoever debugs an agent sees why a tool call arrived as text.
    return {**body, "upspiral": {"parse_errors": errors}} if errors else body


async def stream_chunks(call: Call, chat: ChatRequest, renderer: Renderer, model_name: str) -> AsyncIterator[bytes]:
    """JSON of each chunk, as soon as its text is certain. Raises the call's error after the last chunk."""
    writer = _ChunkWriter(_envelope("chat.completion.chunk", model_name), chat, call, renderer)
    for index in range(chat.request.answers):
        yield writer.chunk(index, {"role": "assistant", "content": ""})
    async for event in call.events():
        for chunk in writer.chunks(event):
            yield chunk
    if chat.include_usage:
        yield writer.usage()


class _ChunkWriter:
    def __init__(self, envelope: dict[str, Any], chat: ChatRequest, call: Call, renderer: Renderer) -> None:
        self._envelope = {**envelope, "usage": None} if chat.include_usage else envelope
        self._logprobs = chat.logprobs
        self._call = call
        self._renderer = renderer
        self._tool_calls = [0] * chat.request.answers
        self._tokens = [0] * chat.request.answers

    def chunks(self, event: AnswerEvent) -> list[bytes]:
        deltas = [self._delta(event.answer, piece) for piece in event.pieces]
        entries = self._entries(event) if self._logprobs and event.tokens else None
        if entries and not deltas:
            deltas = [{}]
        # All log-probabilities of an event go with its first delta: the text of some is still held back.
        written = [self.chunk(event.answer, delta, entries if i == 0 else None) for i, delta in enumerate(deltas)]
        return [*written, self.chunk(event.answer, {}, end=event.end)] if event.end else written

    def chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, end: AnswerEnd | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}
        return orjson.dumps({**self._envelope, "choices": [choice]})

    def usage(self) -> bytes:
        return orjson.dumps({**self._envelope, "choices": [], "usage": _usage(self._call)})

    def _entries(self, event: AnswerEvent) -> dict[str, Any]:
        start = self._tokens[event.answer]
        self._tokens[event.answer] += event.tokens
        return _logprobs(self._call.plan.generations[event.answer], start, start + event.tokens, self._renderer)

    def _delta(self, answer: int, piece: TextPiece | ThinkingPiece | CallPiece) -> dict[str, Any]:
        if isinstance(piece, TextPiece):
            return {"content": piece.text}
        if isinstance(piece, ThinkingPiece):
            return {"reasoning_content": piece.text}
        index = self._tool_calls[answer]
        self._tool_calls[answer] += 1
        return {"tool_calls": [{"index": index, **_wire_call(piece.call)}]}


def _message(entry: Mapping[str, Any], where: str) -> Message:
    role = _ROLES.get(str(entry.get("role")))
    if role is None:
        raise RequestError(f"{where}.role is {shown(entry.get('role'))}; known roles are {', '.join(_ROLES)}")
    text = _text(entry.get("content"), where)
    if role == "tool":
        return Message(role, text, tool_call_id=text_field(entry, "tool_call_id", where))
    if role != "assistant":
        if entry.get("content") is None:
            raise RequestError(f"{where}.content is missing")
        return Message(role, text)
    if entry.get("function_call") is not None:
        raise RequestError(f"{where}.function_call is not supported; use tool_calls")
    calls = tuple(
        _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(list_field(entry, "tool_calls", where))
    )
    thinking = entry.get("reasoning_content")
    return Message(role, text, thinking if isinstance(thinking, str) and thinking else None, calls)


def _text(content: Any, where: str) -> str:
    """A string, or parts of text that are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError(f"{where}.content must be a string or a list of text parts, not {shown(content)}")
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise RequestError(f"{where}.content[{index}] is {shown(part)}; only text parts are supported")
        texts.append(text)
    return "".join(texts)


def _tool_call(entry: Mapping[str, Any], where: str) -> ToolCall:
    if entry.get("type", "function") != "function":
        raise RequestError(f"{where}.type is {shown(entry.get('type'))}; only function calls are supported")
    function = object_field(entry, "function", where)
    name = text_field(function, "name", f"{where}.function")
    arguments = function.get("arguments") or "{}"
    try:
        parsed = json.loads(arguments)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where}.function.arguments of {name!r} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise RequestError(f"{where}.function.arguments of {name!r} must be a JSON object, not {shown(parsed)}")
    return ToolCall(text_field(entry, "id", where), name, arguments)


def _tool(entry: Mapping[str, Any], where: str) -> ToolSpec:
    if entry.get("type", "function") != "function":
        raise RequestError(f"{where}.type is {shown(entry.get('type'))}; only functions are supported")
    function = object_field(entry, "function", where)
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise RequestError(f"{where}.function.description must be a string, not {shown(description)}")
    parameters = object_field(function, "parameters", f"{where}.function")
    return ToolSpec(text_field(function, "name", f"{where}.function"), description, parameters)


def _tool_choice(value: Any) -> ToolChoice:
    if value not in (None, "auto", "none"):
        raise RequestError(f'tool_choice = {shown(value)} is not supported; use "auto" or "none"')
    return ToolChoice("none" if value == "none" else "auto")


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value or []
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        raise RequestError(f"stop must be a non-empty string or a list of them, not {shown(value)}")
    return tuple(strings)


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


def _logprobs(generation: Generation, start: int, stop: int, renderer: Renderer) -> dict[str, Any]:
    entries = []
    for index in range(start, stop):
        text = renderer.decode([generation.token_ids[index]])
        logprob = float(generation.logprobs[index])
        entries.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": entries, "refusal": None}


def _usage(call: Call) -> dict[str, int]:
    """Exactly the tokens that are recorded."""
    prompt = len(call.plan.prompt_ids)
    sampled = sum(len(generation.token_ids) for generation in call.plan.generations)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _envelope(kind: str, model_name: str) -> dict[str, Any]:
    created = int(time.time())
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": created, "model": model_name}
