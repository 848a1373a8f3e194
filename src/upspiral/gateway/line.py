"""Lines of conversation: messages one after the other, the same line where they mean the same.

An agent sends its whole history with every request, so a line is followed from where the last request left it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from upspiral.gateway.echo import Defaults, MessageKey, defaults_of, message_keys
from upspiral.types import Message, ToolSpec

_REMEMBERED = 8
"""Requests whose lines are at hand: a rollout has that many conversations at a time, or they are followed again."""

LineId = bytes
"""A digest of what is said: nothing has to be remembered of lines that nobody goes on with."""
_EMPTY: LineId = b""


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """What a request's messages say."""

    messages: tuple[Message, ...]
    keys: tuple[MessageKey, ...]
    ids: tuple[LineId, ...]
    """[messages] the id of the line up to each message."""
    thoughts: tuple[tuple[int, str], ...]
    """Index and text of the thinking that the agent sends back."""
    defaults: Defaults
    """What the keys take for granted."""

    @property
    def id(self) -> LineId:
        return self.ids[-1] if self.ids else _EMPTY

    def going_on(self, answer: Message) -> tuple[MessageKey, LineId]:
        """The key of an answer, and the id of the line that it makes. Other requests may have offered other tools while
        it was sampled."""
        key = message_keys([answer], self.defaults)[0]
        return key, _longer(self.id, key)


class Lines:
    """Finds the lines of one rollout's requests."""

    def __init__(self) -> None:
        self._defaults: Defaults = {}
        self._recent: deque[Line] = deque(maxlen=_REMEMBERED)

    def offered(self, tools: Sequence[ToolSpec]) -> None:
        """Learns what the tools take for granted. Tools that a request leaves out keep what they took before."""
        defaults = {**self._defaults, **defaults_of(tools)}
        if defaults != self._defaults:
            self._defaults = defaults
            self._recent.clear()

    def follow(self, messages: Sequence[Message]) -> Line:
        messages = tuple(messages)
        nothing = Line((), (), (), (), self._defaults)
        begun = max(self._begun(messages), key=lambda line: len(line.messages), default=nothing)
        start = len(begun.messages)
        keys, ids = message_keys(messages, self._defaults, start), [begun.id]
        for key in keys:
            ids.append(_longer(ids[-1], key))
        thoughts = [(index, each.thinking) for index, each in enumerate(messages[start:], start) if each.thinking]
        line = Line(
            messages, (*begun.keys, *keys), (*begun.ids, *ids[1:]), (*begun.thoughts, *thoughts), self._defaults
        )
        if begun is not nothing:
            self._recent.remove(begun)
        self._recent.append(line)
        return line

    def _begun(self, messages: tuple[Message, ...]) -> list[Line]:
        return [line for line in self._recent if messages[: len(line.messages)] == line.messages]


def _longer(line: LineId, key: MessageKey) -> LineId:
    return hashlib.blake2b(line + repr(key).encode(), digest_size=16).digest()
