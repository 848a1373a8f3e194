"""Lines of conversation: messages one after the other, the same line where they mean the same.

An agent sends its whole history with every request, so a line is followed from where the last request left it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from upspiral.gateway.echo import EchoKeys, MessageKey
from upspiral.types import Message, ToolSpec

_REMEMBERED = 8
"""Requests whose lines are at hand: a rollout has that many conversations at a time, or they are followed again."""
_EMPTY = 0


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """What a request's messages say."""

    messages: tuple[Message, ...]
    keys: tuple[MessageKey, ...]
    ids: tuple[int, ...]
    """[messages] the id of the line up to each message."""
    thoughts: tuple[tuple[int, str], ...]
    """Index and text of the thinking that the agent sends back."""

    @property
    def id(self) -> int:
        return self.ids[-1]


_NOTHING = Line((), (), (), ())


class Lines:
    """All lines of one rollout."""

    def __init__(self) -> None:
        self._echo = EchoKeys()
        self._ids: dict[tuple[int, MessageKey], int] = {}
        """A line and what is said next -> the longer line."""
        self._recent: deque[Line] = deque(maxlen=_REMEMBERED)

    def offered(self, tools: Sequence[ToolSpec]) -> None:
        """Learns what the tools take for granted."""
        if self._echo.offered(tools):
            self._recent.clear()

    def follow(self, messages: Sequence[Message]) -> Line:
        messages = tuple(messages)
        begun = max(self._begun(messages), key=lambda line: len(line.messages), default=_NOTHING)
        start = len(begun.messages)
        keys = self._echo.of(messages, start)
        ids = [begun.id] if start else [_EMPTY]
        for key in keys:
            ids.append(self._longer(ids[-1], key))
        thoughts = [(index, each.thinking) for index, each in enumerate(messages[start:], start) if each.thinking]
        line = Line(messages, (*begun.keys, *keys), (*begun.ids, *ids[1:]), (*begun.thoughts, *thoughts))
        if begun is not _NOTHING:
            self._recent.remove(begun)
        self._recent.append(line)
        return line

    def key(self, message: Message) -> MessageKey:
        return self._echo.of([message])[0]

    def longer(self, line: Line, key: MessageKey) -> int:
        """The id of the line that goes on with a message of this key."""
        return self._longer(line.id, key)

    def _begun(self, messages: tuple[Message, ...]) -> list[Line]:
        return [line for line in self._recent if messages[: len(line.messages)] == line.messages]

    def _longer(self, line_id: int, key: MessageKey) -> int:
        return self._ids.setdefault((line_id, key), len(self._ids) + 1)
