"""GLM-4.5 and later: a name, then keys and values in tags."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from upspiral.errors import TemplateError
from upspiral.rendering.formats.base import CallError, TaggedFormat
from upspiral.rendering.formats.json_calls import make_call
from upspiral.rendering.formats.typed_values import typed_arguments, value_text
from upspiral.types import ToolCall, ToolSpec

_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|\Z))", re.DOTALL)


class Glm(TaggedFormat):
    """`<tool_call>NAME\\n<arg_key>KEY</arg_key>\\n<arg_value>VALUE</arg_value>\\n</tool_call>`.

    Newer models of the family leave out the line breaks; both are read, `line_break` is what is written.
    """

    open_tag, close_tag = "<tool_call>", "</tool_call>"
    tags = (open_tag, close_tag, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    endings = (close_tag,)

    def __init__(self, name: str, line_break: str) -> None:
        self.name = name
        self._line_break = line_break

    def is_inside_value(self, body: str) -> bool:
        return body.rfind("<arg_value>") > body.rfind("</arg_value>")

    def parse(self, body: str, tools: Sequence[ToolSpec]) -> ToolCall:
        name, texts = _read_body(body)
        return make_call(name, typed_arguments(name, texts, tools))

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"{self.open_tag}{self._body(call)}{self.close_tag}" for call in calls)

    def forced_text(self, name: str | None = None) -> str:
        # The line break ends the name, which could go on otherwise; it is read by both members of the family.
        return self.open_tag if name is None else f"{self.open_tag}{name}\n"

    def _body(self, call: ToolCall) -> str:
        texts = [(key, value_text(value)) for key, value in json.loads(call.arguments).items()]
        parts = [call.name]
        for key, text in texts:
            parts += [f"<arg_key>{key}</arg_key>", f"<arg_value>{text}</arg_value>"]
        body = self._line_break.join([*parts, ""])
        try:
            readable = _read_body(body) == (call.name, texts)
        except CallError:
            readable = False
        if not readable or self.is_inside_value(body) or self.close_tag in call.name:
            raise TemplateError(f"a call of {call.name} holds marks of the format {self.name}, which knows no escapes")
        return body


def _read_body(body: str) -> tuple[str, list[tuple[str, str]]]:
    start = body.find("<arg_key>")
    name = (body if start < 0 else body[:start]).strip()
    if not name or "\n" in name or "<" in name:
        raise CallError(f"does not begin with the name of a tool: {body.strip()[:200]!r}")
    texts: list[tuple[str, str]] = []
    position = start if start >= 0 else len(body)
    while (argument := _ARGUMENT.match(body, position)) is not None:
        texts.append((argument[1].strip(), argument[2]))
        position = argument.end()
    if rest := body[position:].strip():
        raise CallError(f"({name}) has something else than <arg_key> and <arg_value>: {rest[:200]!r}")
    return name, texts
