"""DeepSeek V3 and V3.1: calls between special tokens of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from upspiral.errors import TemplateError
from upspiral.rendering.formats.base import CallError, Found, Reading, ToolFormat, find_tag
from upspiral.rendering.formats.json_calls import ends_inside_string, load_json, make_call, same_json
from upspiral.types import ToolCall, ToolSpec

_BAR, _SPACE = "\uff5c", "\u2581"
CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR = (
    f"<{_BAR}tool{_SPACE}{name}{_BAR}>"
    for name in (f"calls{_SPACE}begin", f"calls{_SPACE}end", f"call{_SPACE}begin", f"call{_SPACE}end", "sep")
)
_FENCED = re.compile(r"\s*([^\n]+)\n```json\n(.*?)\n?```\s*", re.DOTALL)


class DeepSeek(ToolFormat):
    """Reads both versions; `fenced` says which one is written.

    V3 writes `function`, the separator, the name and the arguments in a fence of ```` ```json ````; V3.1 the name, the
    separator and the bare arguments.
    """

    tags = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
    endings = (CALL_END, CALLS_END)

    def __init__(self, name: str, *, fenced: bool) -> None:
        self.name = name
        self._fenced = fenced

    def find_call(self, text: str, *, boundary: bool) -> Found:
        return find_tag(text, (CALLS_BEGIN, CALL_BEGIN, CALLS_END) if boundary else (CALLS_BEGIN, CALL_BEGIN))

    def read(self, text: str, tools: Sequence[ToolSpec] = (), *, final: bool = False) -> Reading | None:
        if text.startswith(CALLS_END):
            return Reading(len(CALLS_END))
        start = len(text) - len(text.removeprefix(CALLS_BEGIN).lstrip())
        if not text.startswith(CALL_BEGIN, start):
            rest = text[start:]
            if not final and CALL_BEGIN.startswith(rest):
                return None
            return Reading(start, error=f"has no {CALL_BEGIN}")
        start += len(CALL_BEGIN)
        end = first = text.find(CALL_END, start)
        while end >= 0 and ends_inside_string(text[start:end]):
            end = text.find(CALL_END, end + 1)
        if end < 0 and not final:
            return None
        end = first if end < 0 else end
        if end < 0:
            return Reading(len(text), error=f"is not closed: {CALL_END} is missing")
        try:
            return Reading(end + len(CALL_END), (_parse(text[start:end]),))
        except CallError as error:
            return Reading(end + len(CALL_END), error=str(error))

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        between = "\n" if self._fenced else ""
        return CALLS_BEGIN + between.join(CALL_BEGIN + self._body(call) + CALL_END for call in calls) + CALLS_END

    def forced_text(self, name: str | None = None) -> str:
        begin = CALLS_BEGIN + CALL_BEGIN + (f"function{SEPARATOR}" if self._fenced else "")
        if name is None:
            return begin
        return begin + (f"{name}\n```json\n" if self._fenced else name + SEPARATOR)

    def _body(self, call: ToolCall) -> str:
        arguments = same_json(call.arguments)
        if call.name != call.name.strip() or any(mark in call.name for mark in ("\n", *self.tags)):
            raise TemplateError(f"the format {self.name} cannot express the tool name {call.name!r}")
        if self._fenced:
            return f"function{SEPARATOR}{call.name}\n```json\n{arguments}\n```"
        return f"{call.name}{SEPARATOR}{arguments}"


def _parse(body: str) -> ToolCall:
    before, found, after = body.partition(SEPARATOR)
    if not found:
        raise CallError(f"has no {SEPARATOR}")
    fenced = _FENCED.fullmatch(after)
    if fenced is not None and before.strip() == "function":
        return make_call(fenced[1].strip(), load_json(fenced[2]))
    return make_call(before.strip(), load_json(after))
