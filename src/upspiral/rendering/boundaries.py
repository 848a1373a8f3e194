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


class Boundaries:
    """Message ends of one conversation, in characters of its text.

    A message ends where the conversation up to it ends. Where the whole conversation changes the end of the shorter one
    (tool results that share a turn), it ends where the two part. Where the whole changes more, because a template drops
    old thinking or moves the tools to the last question, the shorter one is rendered as if something followed: that
    changes it in the same way, and what the followers add can be cut off again.
    """

    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[ToolSpec], whole: str
    ) -> None:
        self._template = template
        self._messages = messages
        self._tools = tools
        self._whole = whole
        self._added: dict[tuple[Role, bool, int, bool], str] = {}

    def ends(self) -> list[int]:
        """One end for each message; 0 where the template renders no part of the conversation that ends with it.

        Rendering every part of a long conversation takes time that grows with its square. So an answer and what
        follows it are first rendered alone, behind a short conversation; if the whole text has the same there, the ends
        are known.
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
        except TemplateError:
            return None
        for text in self._texts(alone, ()):
            if len(text) > len(head) and text.startswith(head) and self._whole.startswith(text[len(head) :], start):
                ends = Boundaries(self._template, alone, (), text).ends_by_parts()
                return [start + end - len(head) for end in ends[len(asked) :]]
        return None

    def _end(self, index: int) -> int:
        end = 0
        for text in self._texts(self._messages[: index + 1], self._tools):
            if self._whole.startswith(text):
                return len(text)
            end = max(end, shared_length(text, self._whole))
        return end

    def _texts(self, part: Sequence[Message], tools: Sequence[ToolSpec]) -> Iterator[str]:
        """The ways in which a part of the conversation may stand in the whole: as its end, or as if others followed."""
        followers = _followers(part[-1])
        for number in range(len(followers) + 1):
            try:
                added = self._text_added(part[-1], followers[:number], tools) if number else ""
                text = self._template.text([*part, *followers[:number]], tools)
            except TemplateError:
                continue
            if text.endswith(added) and (added or not number):
                yield text.removesuffix(added)

    def _text_added(self, message: Message, followers: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        """What the followers add to a conversation that ends with such a message; "": that cannot be told."""
        key = (message.role, bool(message.tool_calls), len(followers), bool(tools))
        if key not in self._added:
            system = [each for each in self._messages[:1] if each.role == "system" != message.role]
            part = [*system, *_ending_like(message)]
            closed = self._template.text(part, tools).rpartition(_LAST)[2]
            added = self._template.text([*part, *followers], tools).rpartition(_LAST)[2]
            self._added[key] = added.removeprefix(closed) if added.startswith(closed) else ""
        return self._added[key]


def _groups(messages: Sequence[Message]) -> Iterator[tuple[int, int]]:
    """Each answer and what follows it, as first index and end; before them whatever comes before the first answer."""
    starts = [0, *(index for index, message in enumerate(messages) if message.role == "assistant" and index > 0)]
    yield from zip(starts, [*starts[1:], len(messages)], strict=True)


def _followers(message: Message) -> list[Message]:
    """What may follow such a message, up to a question."""
    result = [Message("tool", SENTINEL, tool_call_id=_CALL.id)] if message.tool_calls else []
    answer = [Message("assistant", SENTINEL)] if message.tool_calls or message.role != "assistant" else []
    return [*result, *answer, Message("user", SENTINEL)]


def _ending_like(message: Message) -> list[Message]:
    """A short conversation that ends with such a message, which says or calls `_LAST`."""
    question, last = Message("user", QUESTION), Message(message.role, _LAST)
    if message.tool_calls:
        return [question, Message("assistant", tool_calls=(replace(_CALL, name=_LAST),))]
    if message.role == "assistant":
        return [question, last]
    if message.role == "tool":
        return [question, Message("assistant", tool_calls=(_CALL,)), replace(last, tool_call_id=_CALL.id)]
    return [last]
