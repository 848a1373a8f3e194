"""/v1/responses/compact: the model sums up a conversation, and the summary stands for it from then on.

An ordinary call, recorded like any other: the conversation as it was, one more user message that asks for the summary,
and an answer. The summary comes back with later requests as a compaction item.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upspiral.gateway.call import Call
from upspiral.gateway.dialects.base import EventWriter
from upspiral.gateway.dialects.openai_responses.answer import usage
from upspiral.gateway.dialects.openai_responses.items import Item
from upspiral.gateway.dialects.pieces import ThinkingCount, carried
from upspiral.gateway.generation import AnswerEvent
from upspiral.gateway.request import AnswerRequest

PROMPT = (
    "The conversation is about to be cut off here. Write a summary for someone who goes on with the work and sees "
    "nothing but your summary: the goal, what was done and found, what was decided and why, what is left to do, and "
    "every name, path, number and command that will be needed. Write only the summary."
)


@dataclass(frozen=True, slots=True)
class CompactExchange:
    request: AnswerRequest
    inputs: Sequence[Item]
    stream: bool = False

    def body(self, call: Call, events: Sequence[AnswerEvent]) -> Mapping[str, Any]:
        """What users said, then the summary of it all."""
        message = call.plan.generations[0].answer().message
        count = ThinkingCount()
        for event in events:
            count.take(event)
        name = secrets.token_hex(12)
        summary = carried("compaction", message.text.strip() or message.thinking or "")
        kept = [_kept(item, f"msg_{name}{index:02d}") for index, item in enumerate(self.inputs) if _is_user(item)]
        return {
            "id": f"resp_{name}",
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*kept, {"type": "compaction", "id": f"cmp_{name}", "encrypted_content": summary}],
            "usage": usage(call, count.tokens),
        }

    def writer(self, call: Call) -> EventWriter:
        raise AssertionError("a compaction is not streamed")


def _is_user(item: Item) -> bool:
    return item.get("type", "message") == "message" and item.get("role") == "user"


def _kept(item: Item, name: str) -> Item:
    kept = {"type": "message", "id": name, "status": "completed", **item}
    if isinstance(kept.get("content"), str):
        kept["content"] = [{"type": "input_text", "text": kept["content"]}]
    return kept
