"""When a message that an agent sends back is the one it was served.

Clients rewrite what means the same: JSON spacing and key order in arguments, None for "", white space around a text,
the ids of tool calls, and many drop the thinking. Equal after that, the sampled tokens stand; anything else is an edit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from upspiral.types import Message

MessageKey = tuple[object, ...]
"""Equal for messages that mean the same."""


class EchoKeys:
    """Keys of messages. Remembers what it canonicalised: an agent sends its whole history with every request."""

    def __init__(self) -> None:
        self._canonical: dict[str, str] = {}

    def of(self, messages: Sequence[Message]) -> list[MessageKey]:
        """One key per message. A tool result is tied to its call by the call's position, because clients rename ids."""
        keys: list[MessageKey] = []
        call_ids: list[str] = []
        for message in messages:
            position, calls, text = None, (), message.text
            if message.role == "assistant":
                call_ids = [call.id for call in message.tool_calls]
                calls = tuple((call.name, self._arguments(call.arguments)) for call in message.tool_calls)
                text = text.strip()
            elif message.tool_call_id in call_ids:
                position = call_ids.index(message.tool_call_id)
            keys.append((message.role, text, calls, position))
        return keys

    def _arguments(self, text: str) -> str:
        known = self._canonical.get(text)
        if known is None:
            known = self._canonical[text] = canonical_json(text)
        return known


def canonical_json(text: str) -> str:
    """The same text for JSON that differs only in spacing, escapes or key order; other text unchanged."""
    try:
        return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    except ValueError:
        return text
