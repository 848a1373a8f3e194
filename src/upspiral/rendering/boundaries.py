"""Where the text of each message ends in a rendered conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from upspiral.errors import TemplateError
from upspiral.rendering.chat_template import ChatTemplate
from upspiral.rendering.segments import shared_length
from upspiral.rendering.turns import QUESTION, SENTINEL, conversation_ending_with
from upspiral.types import Message, Role, ToolCall, ToolSpec

_SHORT = 8
"""Conversations of so many messages are rendered part by part."""
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
        self._added: dict[tuple[_Kind, bool], str] = {}

    def ends(self) -> list[int]:
        """One end for each message; 0 where the template renders no part of the conversation that ends with it.

        Rendering every part of a long conversation takes time that grows with its square. So an answer and what follows
        it are first rendered alone, behind a short conversation; if that is found in the whole text, the ends are in it.
        """
        if len(self._messages) <= _SHORT:
            return self.ends_by_parts()
        ends: list[int] = []
        for first, stop in _groups(self._messages):
            start = ends[-1] if ends else 0
            ends += self._ends_alone(first, stop, start) or [self._end(index) for index in range(first, stop)]
        return [*ends[:-1], len(self._whole)]

    def ends_by_parts(self) -> list[int]:
        """The slow twin of `ends`: every part is rendered."""
        return [*(self._end(index) for index in range(len(self._messages) - 1)), len(self._whole)]

    def _ends_alone(self, first: int, stop: int, start: int) -> list[int] | None:
        """Ends of a group that begins at character `start`; None when its text alone is not what stands there."""
        if first == 0:
            return None
        asked = conversation_ending_with(self._messages[first - 1].role)
        alone = [*asked, *self._messages[first:stop]]
        try:
            head = self._template.text(asked)
            texts = [self._template.text(alone), self._past(alone, ())]
        except TemplateError:
            return None
        for text in texts:
            if len(text) > len(head) and text.startswith(head) and self._whole.startswith(text[len(head) :], start):
                ends = Boundaries(self._template, alone, (), text).ends_by_parts()
                return [start + end - len(head) for end in ends[len(asked) :]]
        return None

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
        try:
            return shared_length(self._past(part, self._tools), self._whole)
        except TemplateError:
            return 0

    def _past(self, part: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        """The text of a conversation as it stands before a question; "": it cannot be told. Raises TemplateError."""
        kind = (part[-1].role, bool(part[-1].tool_calls))
        if (kind, bool(tools)) not in self._added:
            self._added[kind, bool(tools)] = self._text_added_behind(kind, tools)
        added = self._added[kind, bool(tools)]
        followed = self._template.text([*part, *_followers(kind)], tools)
        past = followed.removesuffix(added)
        return past if added and past != followed else ""

    def _text_added_behind(self, kind: _Kind, tools: Sequence[ToolSpec]) -> str:
        """What the followers add to a conversation that ends with such a message. Raises TemplateError."""
        system = [message for message in self._messages[:1] if message.role == "system" and kind[0] != "system"]
        part = [*system, *_ending_with(kind)]
        closed = self._template.text(part, tools).rpartition(_LAST)[2]
        added = self._template.text([*part, *_followers(kind)], tools).rpartition(_LAST)[2]
        return added.removeprefix(closed) if added.startswith(closed) else ""


def _groups(messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Each answer and what follows it, as first index and end; before them whatever comes before the first answer."""
    starts = [0, *(index for index, message in enumerate(messages) if message.role == "assistant" and index > 0)]
    yield from zip(starts, [*starts[1:], len(messages)], strict=True)


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
