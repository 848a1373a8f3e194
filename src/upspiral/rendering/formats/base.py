"""What a tool-call format is, and what its files share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from upspiral.types import ToolCall, ToolSpec


class Found(NamedTuple):
    """Where a call begins."""

    start: int
    """The call's first character; without a call, how many characters cannot belong to one whatever follows."""
    opened: bool


@dataclass(frozen=True, slots=True)
class Reading:
    """What the first `length` characters of a text are. Neither calls nor error: marks of the format, to be dropped."""

    length: int
    calls: tuple[ToolCall, ...] = ()
    error: str | None = None
    """What is wrong with the call; the characters then stay in the text."""
    is_text: bool = False
    """It only looked like a call."""


class CallError(ValueError):
    """A call is malformed; says how, to follow the words "tool call 1". Never leaves `formats/`."""


class ToolFormat(Protocol):
    """One way in which models write tool calls. Stateless.

    Readings depend on the text alone, never on how it arrived: `find_call` and `read` give no answer that more text
    could change. Calls that a user or a model made up are data, so reading never raises.
    """

    name: str
    tags: tuple[str, ...]
    """The marks it is made of. They stay visible where a tokenizer declares them special."""
    endings: tuple[str, ...]
    """No call is complete before one of these was written."""

    @abstractmethod
    def find_call(self, text: str, *, boundary: bool) -> Found:
        """The first call in a text. `boundary`: nothing but calls and white space came before it in this answer."""

    @abstractmethod
    def read(self, text: str, tools: Sequence[ToolSpec] = (), *, final: bool = False) -> Reading | None:
        """Reads a text that begins with a call; None when it takes more text, which `final` says will not come.

        Formats without types of their own take them from the parameters of the offered tools.
        """

    @abstractmethod
    def format_calls(self, calls: Sequence[ToolCall]) -> str:
        """The text of calls as `read` reads them. Raises TemplateError when the format cannot express one."""

    @abstractmethod
    def forced_text(self, name: str | None = None) -> str:
        """A beginning after which only a call of the tool can follow; None: of any tool."""

    def format_call(self, call: ToolCall) -> str:
        """The text of one call."""
        return self.format_calls([call])


class TaggedFormat(ToolFormat, Protocol):
    """A format in which every call stands between an opening and a closing tag."""

    open_tag: str
    close_tag: str

    def find_call(self, text: str, *, boundary: bool) -> Found:
        return find_tag(text, (self.open_tag,))

    def read(self, text: str, tools: Sequence[ToolSpec] = (), *, final: bool = False) -> Reading | None:
        first = end = text.find(self.close_tag, len(self.open_tag))
        while end >= 0:
            if not self.is_inside_value(text[len(self.open_tag) : end]):
                return self._settled(text, end, tools)
            end = text.find(self.close_tag, end + len(self.close_tag))
        if not final:
            return None
        if first >= 0:
            # Every closing tag seemed to stand inside a value that never ended: the value is broken, not the tag.
            return self._settled(text, first, tools)
        return Reading(len(text), error=f"is not closed: {self.close_tag} is missing")

    @abstractmethod
    def is_inside_value(self, body: str) -> bool:
        """Whether a closing tag that follows this text is part of an argument."""

    @abstractmethod
    def parse(self, body: str, tools: Sequence[ToolSpec]) -> ToolCall:
        """The call between the tags. Raises CallError."""

    def _settled(self, text: str, end: int, tools: Sequence[ToolSpec]) -> Reading:
        length = end + len(self.close_tag)
        try:
            return Reading(length, (self.parse(text[len(self.open_tag) : end], tools),))
        except CallError as error:
            return Reading(length, error=str(error))


def find_tag(text: str, tags: Sequence[str]) -> Found:
    """The first of the tags in a text."""
    starts = [start for tag in tags if (start := text.find(tag)) >= 0]
    return Found(min(starts), True) if starts else Found(len(text) - held_back(text, tags), False)


def held_back(text: str, tags: Sequence[str]) -> int:
    """How many last characters of the text may be the beginning of one of the tags."""
    for length in range(min(len(text), max(map(len, tags), default=1) - 1), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0
