"""What formats share that write a call's arguments as plain text between tags, without types and without escapes."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from upspiral.errors import TemplateError
from upspiral.rendering.formats.base import CallError, TaggedFormat
from upspiral.rendering.formats.json_calls import make_call
from upspiral.rendering.formats.typed_values import typed_arguments, value_text
from upspiral.types import ToolCall, ToolSpec

Texts = list[tuple[str, str]]
"""Names and values of arguments, in the order in which they are written."""


class TextArguments(TaggedFormat, Protocol):
    """A tagged format whose members say how name and arguments stand between the tags."""

    @abstractmethod
    def read_body(self, body: str) -> tuple[str, Texts]:
        """Raises CallError."""

    @abstractmethod
    def write_body(self, name: str, texts: Texts) -> str: ...

    def parse(self, body: str, tools: Sequence[ToolSpec]) -> ToolCall:
        name, texts = self.read_body(body)
        return make_call(name, typed_arguments(name, texts, tools))

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        return "\n".join(f"{self.open_tag}{self._checked_body(call)}{self.close_tag}" for call in calls)

    def _checked_body(self, call: ToolCall) -> str:
        """Without escapes, a value that holds the format's own marks would be read as something else."""
        texts = [(key, value_text(value)) for key, value in json.loads(call.arguments).items()]
        body = self.write_body(call.name, texts)
        try:
            readable = self.read_body(body) == (call.name, texts)
        except CallError:
            readable = False
        if not readable or self.is_inside_value(body) or self.close_tag in call.name:
            raise TemplateError(f"a call of {call.name} holds marks of the format {self.name}, which knows no escapes")
        return body
