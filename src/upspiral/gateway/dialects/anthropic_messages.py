"""Anthropic Messages: request bodies to AnswerRequest.

Source: the Anthropic API reference of /v1/messages and /v1/messages/count_tokens. What would change the answer and is
not supported is refused; `cache_control`, `metadata`, `context_management`, `service_tier`, `betas` and the version and
beta headers have no influence on sampling and are let through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from upspiral.gateway.dialects.anthropic_answer import MessagesExchange, ThinkingDisplay, anthropic_error
from upspiral.gateway.dialects.base import Failure, Lookup, RolloutDesk, WireEvent, WireRequest
from upspiral.gateway.dialects.fields import (
    FieldError,
    choice_field,
    flag_field,
    list_field,
    number_field,
    object_field,
    object_list,
    optional_text,
    refuse_unsupported,
    shown,
    text_field,
    text_list,
    whole_field,
)
from upspiral.gateway.dialects.pieces import carried_text
from upspiral.gateway.dialects.reread import read_entries
from upspiral.gateway.dialects.tool_choice import named_choice, required_choice
from upspiral.gateway.request import AnswerRequest, ToolChoice
from upspiral.types import Message, ToolCall, ToolSpec

_ROLES = ("user", "assistant", "system")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {"mcp_servers": ([],), "container": (), "output_format": ()}
_BILLING_LINE = "x-anthropic-billing-header:"
"""Claude Code's first line of system prompt. It changes with each request, and no model is meant to read it."""
_BETWEEN_BLOCKS = "\n\n"
"""Between text blocks of system and user messages, which clients use as paragraphs. Blocks of an answer join as they
were written."""


class AnthropicMessages:
    """The dialect of /v1/messages."""

    mark = "anthropic-version"
    request_id_header = "request-id"
    keepalive: WireEvent | None = ("ping", b'{"type":"ping"}')

    def __init__(self) -> None:
        self.answers = {"/v1/messages": read_exchange}
        self.lookups = (Lookup("POST", "/v1/messages/count_tokens", count_tokens),)
        self.channels = {}

    def error(self, failure: Failure) -> Mapping[str, Any]:
        return anthropic_error(failure)

    def model(self, model_id: str) -> Mapping[str, Any]:
        created = "1970-01-01T00:00:00Z"
        return {"type": "model", "id": model_id, "display_name": model_id, "created_at": created}

    def models(self, model_ids: Sequence[str]) -> Mapping[str, Any]:
        data = [self.model(model_id) for model_id in model_ids]
        return {"data": data, "has_more": False, "first_id": model_ids[0], "last_id": model_ids[-1]}


def read_exchange(body: Mapping[str, Any], desk: RolloutDesk) -> MessagesExchange:
    """Raises RequestError naming the field that is wrong."""
    return MessagesExchange(
        request=_request(body, desk),
        stream=flag_field(body, "stream", False),
        thinking=_thinking_display(object_field(body, "thinking", "")),
        desk=desk,
    )


def count_tokens(wanted: WireRequest, desk: RolloutDesk) -> Mapping[str, Any]:
    """Exactly the prompt tokens that the same request would be answered from."""
    return {"input_tokens": desk.count(_request(wanted.body, desk))}


def _request(body: Mapping[str, Any], desk: RolloutDesk) -> AnswerRequest:
    refuse_unsupported(body, _NEUTRAL)
    refuse_unsupported(object_field(body, "output_config", ""), {"format": ()}, "output_config")
    system = _system(body.get("system"))
    messages = (*system, *read_entries(list_field(body, "messages", ""), "messages", _messages, desk.readings))
    if not body.get("messages"):
        raise FieldError("messages", "must be a list with at least one message")
    if messages[-1].role == "assistant":
        raise FieldError(
            f"messages[{len(body['messages']) - 1}].role",
            "is 'assistant': answers that begin with given text are not supported; end with a user message",
        )
    tools = tuple(_tool(entry, f"tools[{i}]") for i, entry in enumerate(list_field(body, "tools", "")))
    choice = object_field(body, "tool_choice", "")
    return AnswerRequest(
        messages=messages,
        tools=tools,
        tool_choice=_tool_choice(choice, tools),
        parallel_tool_calls=not flag_field(choice, "disable_parallel_tool_use", False, "tool_choice"),
        stop_strings=text_list(body, "stop_sequences"),
        max_tokens=whole_field(body, "max_tokens", least=1),
        temperature=number_field(body, "temperature", least=0),
        top_p=number_field(body, "top_p", least=1e-6, most=1),
        top_k=whole_field(body, "top_k", least=0),
        model=optional_text(body, "model"),
    )


def _system(value: Any) -> list[Message]:
    if value is None:
        return []
    if isinstance(value, str):
        text = _without_billing_line(value)
    else:
        texts = [_without_billing_line(text) for text in _texts(object_list(value, "system"), "system")]
        text = _BETWEEN_BLOCKS.join(text for text in texts if text)
    return [Message("system", text)] if text else []


def _without_billing_line(text: str) -> str:
    if _BILLING_LINE not in text:
        return text
    return "\n".join(line for line in text.split("\n") if not line.startswith(_BILLING_LINE)).strip("\n")


def _messages(entry: Mapping[str, Any], where: str) -> list[Message]:
    """One message of the API can hold several of ours: each tool result is one."""
    role = entry.get("role")
    if role not in _ROLES:
        raise FieldError(f"{where}.role", f"is {shown(role)}; known roles are {', '.join(_ROLES)}")
    content, place = entry.get("content"), f"{where}.content"
    if isinstance(content, str):
        return [Message(role, content)]
    if content is None:
        raise FieldError(place, "is missing")
    blocks = object_list(content, place)
    if role == "assistant":
        return [_assistant_message(blocks, place)]
    if role == "system":
        return [Message("system", _BETWEEN_BLOCKS.join(_texts(blocks, place)))]
    if not blocks:
        raise FieldError(place, "must be a string or a list with at least one block")
    return _user_messages(blocks, place)


def _user_messages(blocks: Sequence[Mapping[str, Any]], where: str) -> list[Message]:
    messages: list[Message] = []
    texts: list[str] = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        if block.get("type") != "tool_result":
            texts.append(_block_text(block, place, "text and tool_result"))
            continue
        if texts:
            messages.append(Message("user", _BETWEEN_BLOCKS.join(texts)))
            texts = []
        messages.append(_tool_result(block, place))
    if texts:
        messages.append(Message("user", _BETWEEN_BLOCKS.join(texts)))
    return messages


def _tool_result(block: Mapping[str, Any], where: str) -> Message:
    content, place = block.get("content"), f"{where}.content"
    if content is None or isinstance(content, str):
        text = content or ""
    else:
        text = "\n".join(_texts(object_list(content, place), place))
    # The API tells the model of a failure beside the text; here the text is all that it sees.
    if flag_field(block, "is_error", False, where) and "error" not in text[:40].lower():
        text = f"Error: {text}"
    return Message("tool", text, tool_call_id=text_field(block, "tool_use_id", where))


def _assistant_message(blocks: Sequence[Mapping[str, Any]], where: str) -> Message:
    texts: list[str] = []
    thinking: list[str] = []
    calls: list[ToolCall] = []
    for index, block in enumerate(blocks):
        place, kind = f"{where}[{index}]", block.get("type")
        if kind == "tool_use":
            arguments = orjson.dumps(object_field(block, "input", place)).decode()
            calls.append(ToolCall(text_field(block, "id", place), text_field(block, "name", place), arguments))
        elif kind == "thinking":
            thinking.append(_thinking(block, place))
        # Nobody but its maker can read redacted thinking, and we make none.
        elif kind != "redacted_thinking":
            texts.append(_block_text(block, place, "text, thinking, redacted_thinking and tool_use"))
    return Message("assistant", "".join(texts), "".join(thinking) or None, tuple(calls))


def _thinking(block: Mapping[str, Any], where: str) -> str:
    return optional_text(block, "thinking", where) or carried_text("thinking", block.get("signature")) or ""


def _texts(blocks: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    return [_block_text(block, f"{where}[{index}]", "text") for index, block in enumerate(blocks)]


def _block_text(block: Mapping[str, Any], where: str, supported: str) -> str:
    if block.get("type") != "text":
        raise FieldError(f"{where}.type", f"is {shown(block.get('type'))}; supported here: {supported}")
    text = block.get("text")
    if not isinstance(text, str):
        raise FieldError(f"{where}.text", f"must be a string, not {shown(text)}")
    return text


def _tool(entry: Mapping[str, Any], where: str) -> ToolSpec:
    if entry.get("type") not in (None, "custom"):
        raise FieldError(
            f"{where}.type",
            f"is {shown(entry['type'])}: tools that a provider runs or that one model was made for are not supported; "
            "offer a tool with a name and an input_schema",
        )
    schema = object_field(entry, "input_schema", where)
    return ToolSpec(text_field(entry, "name", where), optional_text(entry, "description", where), schema)


def _tool_choice(value: Mapping[str, Any], tools: Sequence[ToolSpec]) -> ToolChoice:
    kind = choice_field(value, "type", ("auto", "any", "tool", "none"), "tool_choice")
    if kind == "any":
        return required_choice(tools, "tool_choice.type")
    if kind == "tool":
        return named_choice(text_field(value, "name", "tool_choice"), tools, "tool_choice.name")
    return ToolChoice("none" if kind == "none" else "auto")


def _thinking_display(value: Mapping[str, Any]) -> ThinkingDisplay:
    """Without `thinking` the API serves none, and clients that read `content[0].text` rely on it. What the model thinks
    is sampled and recorded either way."""
    kind = choice_field(value, "type", ("enabled", "disabled", "adaptive"), "thinking")
    if kind in (None, "disabled"):
        return "hidden"
    return "omitted" if value.get("display") == "omitted" else "shown"
