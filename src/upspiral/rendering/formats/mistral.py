"""Mistral: `[TOOL_CALLS]` before a list of calls, or before each name and its arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from upspiral.errors import TemplateError
from upspiral.rendering.formats.base import CallError, Found, Reading, ToolFormat, find_tag
from upspiral.rendering.formats.json_calls import (
    call_from_entry,
    dump_json,
    ends_inside_string,
    json_end,
    load_json,
    make_call,
    same_json,
)
from upspiral.types import ToolCall, ToolSpec

MARK, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_HEAD = re.compile(r"([^\s\[{]+)\s*(?:\[CALL_ID\]\s*([A-Za-z0-9]+)\s*)?(?:\[ARGS\])?\s*")

_Parse = Callable[[Any], list[ToolCall]]


class Mistral(ToolFormat):
    """Reads both forms. Subclasses say which one is written."""

    tags = (MARK, ARGUMENTS, CALL_ID)
    endings = ("}", "]")

    def find_call(self, text: str, *, boundary: bool) -> Found:
        return find_tag(text, (MARK,))

    def read(self, text: str, tools: Sequence[ToolSpec] = (), *, final: bool = False) -> Reading | None:
        body = text[len(MARK) :].lstrip()
        start = len(text) - len(body)
        if body.startswith("["):
            return _read_json(text, start, _list_calls, final)
        head = _HEAD.match(text, start)
        if head is None or text[head.end() : head.end() + 1] not in ("", "{"):
            rest = text[head.end() if head else start :]
            if not final and any(mark.startswith(rest) for mark in (ARGUMENTS, CALL_ID)):
                return None
            return Reading(start, error=f"has neither a list nor a name and arguments behind {MARK}")
        if head.end() == len(text):
            return Reading(len(text), error="is not closed: its arguments are missing") if final else None
        return _read_json(text, head.end(), lambda value: [_named_call(head, value)], final)


class MistralList(Mistral):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`."""

    def __init__(self, name: str, space: str) -> None:
        self.name = name
        self._space = space

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        bodies = [f'{{"name": {dump_json(call.name)}, "arguments": {same_json(call.arguments)}}}' for call in calls]
        return f"{MARK}{self._space}[{', '.join(bodies)}]"

    def forced_text(self, name: str | None = None) -> str:
        begin = f'{MARK}{self._space}[{{"name": '
        return begin + '"' if name is None else f'{begin}{dump_json(name)}, "arguments":'


class MistralArguments(Mistral):
    """`[TOOL_CALLS]NAME[ARGS]{...}`, once for each call."""

    name = "mistral-args"

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        for call in calls:
            if not re.fullmatch(r"[^\s\[{]+", call.name):
                raise TemplateError(f"the format {self.name} cannot express the tool name {call.name!r}")
        return "".join(f"{MARK}{call.name}{ARGUMENTS}{same_json(call.arguments)}" for call in calls)

    def forced_text(self, name: str | None = None) -> str:
        return MARK if name is None else f"{MARK}{name}{ARGUMENTS}"


def _read_json(text: str, start: int, parse: _Parse, final: bool) -> Reading | None:
    """Broken JSON ends where the next call begins, unless that mark is inside a string."""
    end = json_end(text, start)
    following = text.find(MARK, start)
    while following >= 0 and ends_inside_string(text[start:following]):
        following = text.find(MARK, following + 1)
    if end is not None and not 0 <= following < end:
        try:
            return Reading(end, tuple(parse(load_json(text[start:end]))))
        except CallError as error:
            return Reading(end, error=str(error))
    if following < 0 and not final:
        return None
    return Reading(len(text) if following < 0 else following, error="is not closed: its JSON does not end")


def _list_calls(value: Any) -> list[ToolCall]:
    if not value:
        raise CallError("is an empty list")
    calls = [call_from_entry(entry, "arguments") for entry in value]
    ids = [entry.get("id") for entry in value]
    return [
        make_call(call.name, load_json(call.arguments), call_id=given if isinstance(given, str) else None)
        for call, given in zip(calls, ids, strict=True)
    ]


def _named_call(head: re.Match[str], value: Any) -> ToolCall:
    return make_call(head[1], value, call_id=head[2])
