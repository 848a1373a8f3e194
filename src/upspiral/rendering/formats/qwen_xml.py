"""Qwen3-Coder and Qwen3.5: function and parameters as XML-like tags."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from upspiral.errors import TemplateError
from upspiral.rendering.formats.base import CallError, TaggedFormat
from upspiral.rendering.formats.json_calls import make_call
from upspiral.rendering.formats.typed_values import typed_arguments, value_text
from upspiral.types import ToolCall, ToolSpec

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
# A value may hold the closing tag itself, as long as nothing that looks like the end of the call follows.
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>(?=\s*(?:<parameter=[^>\n]+>|\Z))", re.DOTALL)


class QwenXml(TaggedFormat):
    """`<tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>`."""

    name = "qwen-xml"
    open_tag, close_tag = "<tool_call>", "</tool_call>"
    tags = (open_tag, close_tag)
    endings = (close_tag,)

    def is_inside_value(self, body: str) -> bool:
        return body.rfind("<parameter=") > body.rfind("</parameter>")

    def parse(self, body: str, tools: Sequence[ToolSpec]) -> ToolCall:
        name, texts = _read_body(body)
        return make_call(name, typed_arguments(name, texts, tools))

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"{self.open_tag}\n{self._body(call)}\n{self.close_tag}" for call in calls)

    def forced_text(self, name: str | None = None) -> str:
        begin = f"{self.open_tag}\n<function="
        return begin if name is None else f"{begin}{name}>\n"

    def _body(self, call: ToolCall) -> str:
        texts = [(key, value_text(value)) for key, value in json.loads(call.arguments).items()]
        parameters = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts)
        body = f"<function={call.name}>\n{parameters}</function>"
        try:
            readable = _read_body(f"\n{body}\n") == (call.name, texts)
        except CallError:
            readable = False
        if not readable or self.is_inside_value(body) or self.close_tag in call.name:
            raise TemplateError(f"a call of {call.name} holds marks of the format {self.name}, which knows no escapes")
        return body


def _read_body(body: str) -> tuple[str, list[tuple[str, str]]]:
    function = _FUNCTION.fullmatch(body)
    if function is None:
        raise CallError(f"is not <function=NAME>...</function>: {body.strip()[:200]!r}")
    name, inner = function[1].strip(), function[2]
    texts: list[tuple[str, str]] = []
    position = 0
    while (parameter := _PARAMETER.match(inner, position)) is not None:
        texts.append((parameter[1].strip(), parameter[2].removeprefix("\n").removesuffix("\n")))
        position = parameter.end()
    if rest := inner[position:].strip():
        raise CallError(f"({name}) has something else than <parameter=KEY>...</parameter>: {rest[:200]!r}")
    return name, texts
