"""Where the text of each message ends in a rendered conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from upspiral.errors import TemplateError
from upspiral.rendering.chat_template import ChatTemplate
from upspiral.rendering.segments import shared_length
from upspiral.rendering.turns import QUESTION, SENTINEL
from upspiral.types import Message, Role, ToolCall, ToolSpec

_LAST = "last_words"
_CALL = ToolCall("call00000", SENTINEL, "{}")
_Kind = tuple[Role, bool]
"""A role, and whether the message calls tools."""


class Boundaries:
    """Message ends of one conversation, in characters of its text.

    A message ends where the conversation up to it ends. Where the whole conversation changes the end of the shorter one
    (tool results that share a turn), it ends where the two part. Where the whole changes more, because a template drops
    old thinking or moves the tools to the last question, the shorter one is rendered as if a question followed: that
    changes it in the same way, and what the question adds can be cut off again.
    """

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[ToolSpec], whole: str
    ) -> None:
        self._template = template
        self._messages = messages
        self._tools = tools
        self._whole = whole
        self._added: dict[_Kind, str] = {}

    def ends(self) -> list[int]:
        """One end for each message; 0 where the template renders no part of the conversation that ends with it."""
        return [*(self._end(index) for index in range(len(self._messages) - 1)), len(self._whole)]

    def _end(self, index: int) -> int:
        part = self._messages[: index + 1]
        try:
            text = self._template.text(part, self._tools)
        except TemplateError:
            return self._end_if_followed(part)
        if self._whole.startswith(text):
            return len(text)
        return max(shared_length(text, self._whole), self._end_if_followed(part))

    def _end_if_followed(self, part: Sequence[Message]) -> int:
        kind = (part[-1].role, bool(part[-1].tool_calls))
        try:
            if kind not in self._added:
                self._added[kind] = self._text_added_behind(kind)
            followed = self._template.text([*part, *_followers(kind)], self._tools)
        except TemplateError:
            return 0
        past = followed.removesuffix(self._added[kind])
        return shared_length(past, self._whole) if self._added[kind] and past != followed else 0

    def _text_added_behind(self, kind: _Kind) -> str:
        """What the followers add to a conversation that ends with such a message. Raises TemplateError."""
        system = [message for message in self._messages[:1] if message.role == "system" and kind[0] != "system"]
        part = [*system, *_ending_with(kind)]
        closed = self._template.text(part, self._tools).rpartition(_LAST)[2]
        added = self._template.text([*part, *_followers(kind)], self._tools).rpartition(_LAST)[2]
        return added.removeprefix(closed) if added.startswith(closed) else ""


def _followers(kind: _Kind) -> list[Message]:
    """What may follow such a message, up to a question."""
    role, has_calls = kind
    result = [Message("tool", SENTINEL, tool_call_id=_CALL.id)] if has_calls else []
    answer = [Message("assistant", SENTINEL)] if has_calls or role != "assistant" else []
    return [*result, *answer, Message("user", SENTINEL)]


def _ending_with(kind: _Kind) -> list[Message]:
    role, has_calls = kind
    question, last = Message("user", QUESTION), Message(role, _LAST)
    if has_calls:
        return [question, Message("assistant", tool_calls=(replace(_CALL, name=_LAST),))]
    if role == "assistant":
        return [question, last]
    if role == "tool":
        return [question, Message("assistant", tool_calls=(_CALL,)), replace(last, tool_call_id=_CALL.id)]
    return [last]
