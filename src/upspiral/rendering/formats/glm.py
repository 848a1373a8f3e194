"""GLM-4.5 and later: a name, then keys and values in tags."""

from __future__ import annotations

import re

from upspiral.rendering.formats.base import CallError
from upspiral.rendering.formats.text_arguments import TextArguments, Texts

_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|\Z))", re.DOTALL)


class Glm(TextArguments):
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

    def forced_text(self, name: str | None = None) -> str:
        # The line break ends the name, which could go on otherwise; it is read by both members of the family.
        return self.open_tag if name is None else f"{self.open_tag}{name}\n"

    def read_body(self, body: str) -> tuple[str, Texts]:
        start = body.find("<arg_key>")
        name = (body if start < 0 else body[:start]).strip()
        if not name or "\n" in name or "<" in name:
            raise CallError(f"does not begin with the name of a tool: {body.strip()[:200]!r}")
        texts: Texts = []
        position = start if start >= 0 else len(body)
        while (argument := _ARGUMENT.match(body, position)) is not None:
            texts.append((argument[1].strip(), argument[2]))
            position = argument.end()
        if rest := body[position:].strip():
            raise CallError(f"({name}) has something else than <arg_key> and <arg_value>: {rest[:200]!r}")
        return name, texts

    def write_body(self, name: str, texts: Texts) -> str:
        parts = [name]
        for key, text in texts:
            parts += [f"<arg_key>{key}</arg_key>", f"<arg_value>{text}</arg_value>"]
        return self._line_break.join([*parts, ""])
