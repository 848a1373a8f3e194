"""Input items of the Responses API to messages.

An answer is served as a reasoning item, message items and call items; here they become one Message again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from upspiral.gateway.dialects.fields import (
    FieldError,
    arguments_field,
    object_field,
    object_list,
    optional_text,
    shown,
    text_field,
)
from upspiral.gateway.dialects.openai_responses.tools import custom_arguments, flat_name, local_shell_arguments
from upspiral.gateway.dialects.pieces import carried_text
from upspiral.types import Message, Role, ToolCall

SUMMARY_LEAD = "Summary of the conversation so far:"
"""Begins the message that stands for a compaction item."""
_BETWEEN_PARTS = "\n\n"
"""Between text parts of what is not an answer. Parts of an answer join as they were written."""
_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_THINKING_PARTS = {"reasoning_text": "text", "summary_text": "text", "text": "text"}

Item = Mapping[str, Any]
FindItem = Callable[[str], Item | None]
"""An item of an earlier response by its id."""


def read_messages(
    items: Sequence[Item], instructions: str, find_item: FindItem, *, first: int = 0
) -> tuple[Message, ...]:
    """Raises FieldError naming the item that is wrong. `first` is where the request's own `input` begins; what stands
    before it was read in an earlier request."""
    reader = _ItemReader(instructions)
    for index, item in enumerate(items, start=-first):
        reader.read(item, f"input[{index}]", find_item)
    return reader.finish()


def input_items(value: Any) -> list[Item]:
    """The request's `input`: a text, or a list of items."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
    return object_list(value, "input")


class _ItemReader:
    def __init__(self, instructions: str) -> None:
        self._messages = [Message("system", instructions)] if instructions else []
        self._answer: _AnswerDraft | None = None
        self._call_ids: set[str] = set()

    def read(self, item: Item, where: str, find_item: FindItem) -> None:
        kind = optional_text(item, "type", where) or ("message" if "role" in item else "item_reference")
        if kind == "message":
            self._message(item, where)
        elif kind == "item_reference":
            self._reference(item, where, find_item)
        elif kind in _CALLS:
            call = _CALLS[kind](item, where)
            self._call_ids.add(call.id)
            self._draft().calls.append(call)
        elif kind in _OUTPUTS:
            self._output(item, where)
        elif kind == "reasoning":
            self._reasoning(item, where)
        elif kind in _COMPACTIONS:
            self._compaction(item, where)
        else:
            known = ", ".join(["message", "reasoning", *_CALLS, *_OUTPUTS, *_COMPACTIONS, "item_reference"])
            raise FieldError(f"{where}.type", f"is {shown(kind)}; supported are {known}")

    def finish(self) -> tuple[Message, ...]:
        self._close()
        # Instructions and what developers add at the start are one system prompt: few templates render two.
        leading = next((i for i, message in enumerate(self._messages) if message.role != "system"), len(self._messages))
        if leading > 1:
            text = _BETWEEN_PARTS.join(message.text for message in self._messages[:leading])
            self._messages[:leading] = [Message("system", text)]
        return tuple(self._messages)

    def _message(self, item: Item, where: str) -> None:
        role = _ROLES.get(str(item.get("role")))
        if role is None:
            raise FieldError(f"{where}.role", f"is {shown(item.get('role'))}; known roles are {', '.join(_ROLES)}")
        if role == "assistant":
            # Two messages in a row are two answers. One after a call belongs to it: a finished call has an output.
            if self._answer is not None and self._answer.texts and not self._answer.calls:
                self._close()
            self._draft().texts.append(_text(item.get("content"), f"{where}.content", _TEXT_PARTS, ""))
            return
        self._close()
        text = _text(item.get("content"), f"{where}.content", _TEXT_PARTS, _BETWEEN_PARTS)
        self._messages.append(Message(role, text))

    def _reasoning(self, item: Item, where: str) -> None:
        # Thinking begins an answer.
        if self._answer is not None and (self._answer.texts or self._answer.calls):
            self._close()
        self._draft().thinking.append(_thinking(item, where))

    def _output(self, item: Item, where: str) -> None:
        key = "call_id" if item.get("call_id") else "id"
        call_id = text_field(item, key, where)
        if call_id not in self._call_ids:
            raise FieldError(f"{where}.{key}", f"= {shown(call_id)} names no tool call before it")
        self._close()
        text = _text(item.get("output"), f"{where}.output", _TEXT_PARTS, "\n")
        self._messages.append(Message("tool", text, tool_call_id=call_id))

    def _compaction(self, item: Item, where: str) -> None:
        summary = carried_text("compaction", item.get("encrypted_content"))
        if summary is None:
            raise FieldError(f"{where}.encrypted_content", "was not made by this gateway; it cannot be read")
        self._close()
        self._messages.append(Message("user", f"{SUMMARY_LEAD}\n\n{summary}"))

    def _reference(self, item: Item, where: str, find_item: FindItem) -> None:
        name = text_field(item, "id", where)
        found = find_item(name)
        if found is None:
            raise FieldError(f"{where}.id", f"= {shown(name)} is no item of a stored response; send the item itself")
        self.read(found, where, _no_item)

    def _draft(self) -> _AnswerDraft:
        if self._answer is None:
            self._answer = _AnswerDraft()
        return self._answer

    def _close(self) -> None:
        if self._answer is not None:
            self._messages.append(self._answer.message())
            self._answer = None


class _AnswerDraft:
    """An answer whose items are being collected."""

    def __init__(self) -> None:
        self.thinking: list[str] = []
        self.texts: list[str] = []
        self.calls: list[ToolCall] = []

    def message(self) -> Message:
        return Message("assistant", "".join(self.texts), "".join(self.thinking) or None, tuple(self.calls))


def _function_call(item: Item, where: str) -> ToolCall:
    name = flat_name(optional_text(item, "namespace", where), text_field(item, "name", where))
    return ToolCall(text_field(item, "call_id", where), name, arguments_field(item, "arguments", where))


def _custom_call(item: Item, where: str) -> ToolCall:
    name = flat_name(optional_text(item, "namespace", where), text_field(item, "name", where))
    arguments = custom_arguments(optional_text(item, "input", where))
    return ToolCall(text_field(item, "call_id", where), name, arguments)


def _local_shell_call(item: Item, where: str) -> ToolCall:
    call_id = text_field(item, "call_id" if item.get("call_id") else "id", where)
    return ToolCall(call_id, "local_shell", local_shell_arguments(object_field(item, "action", where)))


_CALLS: Mapping[str, Callable[[Item, str], ToolCall]] = {
    "function_call": _function_call,
    "custom_tool_call": _custom_call,
    "local_shell_call": _local_shell_call,
}


def read_call(item: Item) -> ToolCall:
    """The call that comes back when a client sends a call's item as it got it."""
    return _CALLS[item["type"]](item, "")


_OUTPUTS = ("function_call_output", "custom_tool_call_output", "local_shell_call_output")
_COMPACTIONS = ("compaction", "compaction_summary", "context_compaction")


def _thinking(item: Item, where: str) -> str:
    """From whatever the client kept: all three hold the same text. Another provider's secret holds none for us."""
    carried = carried_text("thinking", item.get("encrypted_content"))
    if carried is not None:
        return carried
    for key in ("content", "summary"):
        if text := _text(item.get(key) or "", f"{where}.{key}", _THINKING_PARTS, ""):
            return text
    return ""


def _text(content: Any, where: str, parts: Mapping[str, str], between: str) -> str:
    """A string, or parts of text that are joined."""
    if isinstance(content, str):
        return content
    if content is None:
        raise FieldError(where, "is missing")
    texts: list[str] = []
    for index, part in enumerate(object_list(content, where)):
        key = parts.get(str(part.get("type")))
        text = None if key is None else part.get(key)
        if not isinstance(text, str):
            raise FieldError(f"{where}[{index}]", f"is {shown(part)}; only text parts are supported")
        texts.append(text)
    return between.join(texts)


def _no_item(name: str) -> None:
    del name
