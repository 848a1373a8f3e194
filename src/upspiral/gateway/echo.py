"""When a message that an agent sends back is the one it was served.

Clients rewrite what means the same: JSON spacing and key order in arguments, 1 for 1.0 (JavaScript knows no other
number), arguments that were left out and have a default in the tool's schema, None for "", white space around a text,
the ids of tool calls, and many drop the thinking.
Equal after that, the sampled tokens stand; anything else is an edit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from upspiral.types import Message, ToolSpec

MessageKey = tuple[object, ...]
"""Equal for messages that mean the same."""
Defaults = Mapping[str, Mapping[str, str]]
"""Tool -> its arguments that have a default -> the default as canonical JSON."""
_EXACT_BELOW = 2**53
"""Whole numbers from here on are not all different as floats."""


def defaults_of(tools: Sequence[ToolSpec]) -> Defaults:
    """What the tools take for granted: some agents write it into the calls that they send back."""
    found: dict[str, Mapping[str, str]] = {}
    for tool in tools:
        properties = tool.parameters.get("properties")
        fields = properties.items() if isinstance(properties, Mapping) else ()
        found[tool.name] = {
            name: canonical_json(json.dumps(each["default"]))
            for name, each in fields
            if isinstance(each, Mapping) and "default" in each
        }
    return found


def message_keys(messages: Sequence[Message], defaults: Defaults, start: int = 0) -> list[MessageKey]:
    """One key for each message from `start` on. A tool result is tied to its call by the call's position, because
    clients rename ids."""
    keys: list[MessageKey] = []
    asked = next((each for each in reversed(messages[:start]) if each.role == "assistant"), None)
    call_ids = [call.id for call in asked.tool_calls] if asked else []
    for message in messages[start:]:
        position, calls, text = None, (), message.text
        if message.role == "assistant":
            call_ids = [call.id for call in message.tool_calls]
            calls = tuple(
                (call.name, canonical_json(call.arguments, defaults.get(call.name, {}))) for call in message.tool_calls
            )
            text = text.strip()
        elif message.tool_call_id in call_ids:
            position = call_ids.index(message.tool_call_id)
        keys.append((message.role, text, calls, position))
    return keys


def canonical_json(text: str, defaults: Mapping[str, str] = {}) -> str:
    """The same text for JSON that differs only in spacing, escapes, key order, how a number is written or members that
    equal their default; other text unchanged."""
    try:
        value = json.loads(text, parse_float=_number)
    except ValueError:
        return text
    if defaults and isinstance(value, dict):
        value = {name: each for name, each in value.items() if name not in defaults or _json(each) != defaults[name]}
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _number(text: str) -> float | int:
    """A whole number as one, however it is written, as long as that is exact."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < _EXACT_BELOW else value
