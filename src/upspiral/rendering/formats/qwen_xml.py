"""Qwen3-Coder and Qwen3.5: function and parameters as XML-like tags."""

from __future__ import annotations

import re

from upspiral.rendering.formats.base import CallError
from upspiral.rendering.formats.text_arguments import TextArguments, Texts

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
# A value may hold the closing tag itself, as long as nothing that looks like the end of the call follows.
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>(?=\s*(?:<parameter=[^>\n]+>|\Z))", re.DOTALL)


class QwenXml(TextArguments):
    """`<tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>`."""

    name = "qwen-xml"
    open_tag, close_tag = "<tool_call>", "</tool_call>"
    tags = (open_tag, close_tag)
    endings = (close_tag,)

    def is_inside_value(self, body: str) -> bool:
        return body.rfind("<parameter=") > body.rfind("</parameter>")

    def forced_text(self, name: str | None = None) -> str:
        begin = f"{self.open_tag}\n<function="
        return begin if name is None else f"{begin}{name}>\n"

    def read_body(self, body: str) -> tuple[str, Texts]:
        function = _FUNCTION.fullmatch(body)
        if function is None:
            raise CallError(f"is not <function=NAME>...</function>: {body.strip()[:200]!r}")
        name, inner = function[1].strip(), function[2]
        texts: Texts = []
        position = 0
        while (parameter := _PARAMETER.match(inner, position)) is not None:
            texts.append((parameter[1].strip(), parameter[2].removeprefix("\n").removesuffix("\n")))
            position = parameter.end()
        if rest := inner[position:].strip():
            raise CallError(f"({name}) has something else than <parameter=KEY>...</parameter>: {rest[:200]!r}")
        return name, texts

    def write_body(self, name: str, texts: Texts) -> str:
        parameters = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts)
        return f"\n<function={name}>\n{parameters}</function>\n"
