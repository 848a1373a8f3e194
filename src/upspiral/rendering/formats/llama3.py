"""Llama 3: a bare JSON object, or one behind `<|python_tag|>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upspiral.rendering.formats.base import CallError, Found, Reading, ToolFormat, find_tag
from upspiral.rendering.formats.json_calls import call_from_entry, dump_json, json_end, load_json, same_json
from upspiral.types import ToolCall, ToolSpec

PYTHON_TAG = "<|python_tag|>"
_BETWEEN = "; \t\r\n"
"""What stands between the calls of one answer."""
_BARE_BEGINNINGS = ('{"name":', '{"type":')
_LOOK_AHEAD = 64


class Llama3(ToolFormat):
    """`{"name": ..., "parameters": {...}}`, calls parted by a semicolon.

    A bare object is a call only where the answer begins, and only if it has a name and parameters: everything else is
    text, since an answer may well be JSON.
    """

    tags = (PYTHON_TAG,)
    endings = ("}",)

    def __init__(self, name: str, mark: str) -> None:
        self.name = name
        self._mark = mark

    def find_call(self, text: str, *, boundary: bool) -> Found:
        if boundary and (opens := _opens(text)) is not False:
            return Found(0, bool(opens))
        return find_tag(text, (PYTHON_TAG,))

    def read(self, text: str, tools: Sequence[ToolSpec] = (), *, final: bool = False) -> Reading | None:
        body = text.lstrip(_BETWEEN)
        marked = body.startswith(PYTHON_TAG)
        body = body.removeprefix(PYTHON_TAG).lstrip()
        start = len(text) - len(body)
        if not body.startswith("{"):
            # Code for a built-in interpreter. Nobody here runs it, so it stays text.
            error = f"is not a JSON object behind {PYTHON_TAG}"
            return Reading(start, error=error) if body or final else None
        end = json_end(text, start)
        if end is None:
            return _unfinished(text, body, marked) if final else None
        return _settled(text[start:end], end, marked)

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        bodies = [f'{{"name": {dump_json(call.name)}, "parameters": {same_json(call.arguments)}}}' for call in calls]
        return self._mark + "; ".join(bodies)

    def forced_text(self, name: str | None = None) -> str:
        begin = f'{self._mark}{{"name": '
        return begin + '"' if name is None else f'{begin}{dump_json(name)}, "parameters":'


def _opens(text: str) -> bool | None:
    """Whether the text begins with a bare call; None: it may."""
    body = text.lstrip(_BETWEEN)
    compact = "".join(body[:_LOOK_AHEAD].split())
    if compact.startswith(_BARE_BEGINNINGS):
        return True
    return None if any(begin.startswith(compact) for begin in _BARE_BEGINNINGS) else False


def _settled(body: str, length: int, marked: bool) -> Reading:
    try:
        value = load_json(body)
        if not marked and not _is_call(value):
            return Reading(length, is_text=True)
        return Reading(length, (call_from_entry(value, "parameters", "arguments"),))
    except CallError as error:
        return Reading(length, error=str(error))


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and "name" in value and ("parameters" in value or "arguments" in value)


def _unfinished(text: str, body: str, marked: bool) -> Reading:
    if not marked and "".join(body[:_LOOK_AHEAD].split()).startswith(_BARE_BEGINNINGS[1]):
        return Reading(len(text), is_text=True)
    return Reading(len(text), error="is not closed: its JSON object does not end")
