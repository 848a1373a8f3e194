"""New messages behind an answer whose sampled ids are stored, for any template.

The messages are rendered behind a dummy question and answer, and what follows the dummy answer is their text. That
holds if the template writes a message the same whatever came long before it. So the first tail of each shape (its
roles) is also rendered behind other beginnings, and when they disagree the answer is `TailMismatch`, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from upspiral.errors import TailMismatch, TemplateError
from upspiral.rendering.chat_template import ChatTemplate
from upspiral.rendering.encoder import Encoded, Encoder
from upspiral.rendering.segments import Segment, cut_segments, shared_length
from upspiral.rendering.turns import QUESTION, SENTINEL, Turns
from upspiral.types import FinishReason, Message, Role, ToolCall, ToolSpec

_Shape = tuple[bool, tuple[tuple[Role, int], ...]]
"""Whether the tools' names are known, and of each message its role and number of tool calls."""
_MAX_VERDICTS = 1024


@dataclass(frozen=True, slots=True)
class _Tail:
    """The end of a conversation, from the dummy answer on."""

    encoded: Encoded
    answer_end: int
    """The first token behind what the dummy answer says."""
    closing: int
    """The token that ends the answer: it closes the turn, or opens the next one."""


class TailRenderer:
    """Immutable but for what it remembers of shapes, which threads may do twice."""

    def __init__(self, template: ChatTemplate, encoder: Encoder, turns: Turns) -> None:
        self._template = template
        self._encoder = encoder
        self._turns = turns
        self._verdicts: dict[_Shape, str | None] = {}

    def render(
        self,
        messages: Sequence[Message],
        after: FinishReason,
        stop_token: int | None,
        calls: Sequence[ToolCall],
    ) -> list[Segment]:
        """See `Renderer.render_tail`."""
        if not messages:
            return []
        try:
            self._check_shape(messages, with_names=bool(calls))
            return self._cut(messages, after, stop_token, calls)
        except TailMismatch:
            raise
        except TemplateError as error:
            # The template refuses the dummy conversation; it may still render the real one.
            raise TailMismatch(f"{error}; the conversation must be rendered whole") from error

    def _cut(
        self, messages: Sequence[Message], after: FinishReason, stop_token: int | None, calls: Sequence[ToolCall]
    ) -> list[Segment]:
        guarded, marks = self._encoder.guard(messages)
        head = _dummy_exchange(guarded, calls)
        texts = [self._template.text([*head, *guarded[: end + 1]]) for end in range(len(messages))]
        begin = self._answer_begin(texts[-1], head)
        tail = self._read(texts[-1][begin:], head, marks)
        start = self._start(tail, after, stop_token)
        ends = [shared_length(text, texts[-1]) - begin for text in texts]
        return cut_segments(tail.encoded, ends, messages, start)

    def _answer_begin(self, text: str, head: Sequence[Message]) -> int:
        """Where the dummy answer stands. Some templates leave out what is said beside a call, and the messages behind
        it may say the same: it begins with whatever of it comes first."""
        asked = text.find(QUESTION) + len(QUESTION)
        names = (call.name for call in head[-1].tool_calls)
        found = [at for each in (SENTINEL, *names) if (at := text.find(each, asked)) >= 0]
        if not found:
            raise self._mismatch("leaves out an answer that messages follow")
        return min(found)

    def _read(self, text: str, head: Sequence[Message], marks: Mapping[str, str]) -> _Tail:
        """Encoding may begin at the dummy answer: the special token that ends it parts what is before from the rest."""
        encoded = self._encoder.encode(text, marks)
        closing = next((index for index, token in enumerate(encoded.ids) if self._closes(token)), None)
        if closing is None:
            raise self._mismatch("does not end an answer with a special token")
        answer_end = closing
        while not head[-1].tool_calls and answer_end > 0 and encoded.starts[answer_end - 1] >= len(SENTINEL):
            answer_end -= 1
        return _Tail(encoded, answer_end, closing)

    def _closes(self, token: int) -> bool:
        if self._turns.end_of_turn is not None:
            return token == self._turns.end_of_turn
        tool_format = self._template.tool_format
        marks = () if tool_format is None else tool_format.tags
        return token in self._encoder.special and self._encoder.special[token] not in marks

    def _start(self, tail: _Tail, after: FinishReason, stop_token: int | None) -> int:
        """The first token that is not stored yet."""
        if after != "stop":
            return tail.answer_end
        if self._turns.end_of_turn is None and tail.encoded.ids[tail.closing] != stop_token:
            # The model announced another turn than the one that came: what it sampled stands, and the turn is opened.
            return tail.closing
        return tail.closing + 1

    def _check_shape(self, messages: Sequence[Message], *, with_names: bool) -> None:
        """Raises TailMismatch when messages of these roles are rendered differently behind different beginnings."""
        shape: _Shape = (with_names, tuple((message.role, len(message.tool_calls)) for message in messages))
        if shape not in self._verdicts:
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            self._verdicts[shape] = self._judge(messages, with_names)
        if (verdict := self._verdicts[shape]) is not None:
            raise self._mismatch(verdict)

    def _judge(self, messages: Sequence[Message], with_names: bool) -> str | None:
        tail = [_placeholder(message, index) for index, message in enumerate(messages)]
        head = _dummy_exchange(tail, ())
        expected = self._text_behind(head, tail)
        for why, before, tools in _beginnings(head, with_names):
            try:
                found = self._text_behind(before, tail, tools)
            except TailMismatch:
                raise
            except TemplateError:
                continue  # A beginning that the template refuses cannot be what a conversation began with.
            if found != expected:
                roles = ", ".join(message.role for message in messages)
                return f"renders [{roles}] differently {why} (at {_context(expected, found)!r})"
        return None

    def _text_behind(self, head: Sequence[Message], tail: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> str:
        text = self._template.text([*head, *tail], tools)
        begin = self._answer_begin(text, head[-2:])
        read = self._read(text[begin:], head[-2:], {})
        return text[begin + read.encoded.starts[read.closing] :]

    def _mismatch(self, what: str) -> TailMismatch:
        return TailMismatch(f"chat template {self._template.name} {what}; the conversation must be rendered whole")


def _dummy_exchange(tail: Sequence[Message], calls: Sequence[ToolCall]) -> list[Message]:
    """A question and an answer; the answer calls the tools whose results the tail begins with, because some templates
    refuse results that nobody asked for."""
    results = list(takewhile(lambda message: message.role == "tool", tail))
    made = [ToolCall(call.id, call.name, "{}") for call in calls] if results else []
    known = {call.id for call in made}
    for number, result in enumerate(results):
        if result.tool_call_id is None or result.tool_call_id not in known:
            made.append(ToolCall(result.tool_call_id or f"call{number:05d}", SENTINEL, "{}"))
    return [Message("user", QUESTION), Message("assistant", SENTINEL, tool_calls=tuple(made))]


def _placeholder(message: Message, index: int) -> Message:
    calls = tuple(ToolCall(f"tail{index:03d}{n:02d}", SENTINEL, "{}") for n in range(len(message.tool_calls)))
    call_id = None if message.role != "tool" else f"tool{index:05d}"
    return Message(message.role, f"placeholder {index}", None, calls, call_id)


def _beginnings(
    head: Sequence[Message], with_names: bool
) -> Iterator[tuple[str, Sequence[Message], Sequence[ToolSpec]]]:
    tool = ToolSpec("probe", "A probe.", {"type": "object", "properties": {}})
    earlier = [Message("user", "earlier"), Message("assistant", "before")]
    yield "in a longer conversation", [*earlier, *head], ()
    yield "behind a system prompt", [Message("system", "Be brief."), *head], ()
    yield "when tools are offered", head, [tool]
    if head[-1].tool_calls and not with_names:
        renamed = tuple(replace(call, name="other") for call in head[-1].tool_calls)
        yield "for other tools, whose names were not given", [head[0], replace(head[-1], tool_calls=renamed)], ()


def _context(expected: str, found: str) -> str:
    at = shared_length(expected, found)
    return found[max(0, at - 20) : at + 20]
