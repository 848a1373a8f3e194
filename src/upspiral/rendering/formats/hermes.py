"""Hermes, ChatML and Qwen up to 3: a JSON object between `<tool_call>` tags."""

from __future__ import annotations

from collections.abc import Sequence

from upspiral.rendering.formats.base import TaggedFormat
from upspiral.rendering.formats.json_calls import call_from_entry, dump_json, ends_inside_string, load_json, same_json
from upspiral.types import ToolCall, ToolSpec


class Hermes(TaggedFormat):
    """`<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, one block a call."""

    name = "hermes"
    open_tag, close_tag = "<tool_call>", "</tool_call>"
    tags = (open_tag, close_tag)
    endings = (close_tag,)

    def is_inside_value(self, body: str) -> bool:
        return ends_inside_string(body)

    def parse(self, body: str, tools: Sequence[ToolSpec]) -> ToolCall:
        return call_from_entry(load_json(body), "arguments")

    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        bodies = [f'{{"name": {dump_json(call.name)}, "arguments": {same_json(call.arguments)}}}' for call in calls]
        return "\n".join(f"{self.open_tag}\n{body}\n{self.close_tag}" for body in bodies)

    def forced_text(self, name: str | None = None) -> str:
        begin = f'{self.open_tag}\n{{"name": '
        return begin + '"' if name is None else f'{begin}{dump_json(name)}, "arguments":'
