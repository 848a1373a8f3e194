"""What the model wrote, read while it arrives: thinking, text and tool calls in the template's format.

Streaming and not streaming go through the same reader, so they cannot disagree.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from upspiral.rendering.formats.base import ToolFormat, held_back
from upspiral.rendering.formats.registry import HERMES
from upspiral.rendering.text_decoder import TextDecoder
from upspiral.rendering.thinking import THINK, ThinkingTags
from upspiral.types import Message, Role, ToolCall, ToolSpec


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str


@dataclass(frozen=True, slots=True)
class ThinkingPiece:
    text: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    call: ToolCall


Piece = TextPiece | ThinkingPiece | CallPiece


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """An answer as a message. `errors` say what was wrong with tool calls that therefore stayed in the text."""

    message: Message
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadingRules:
    """What to look for in an answer."""

    tool_calls: bool = True
    """Off: a call is plain text, because no tools were offered."""
    parallel_tool_calls: bool = True
    """Off: the answer ends after its first tool call."""
    stop_strings: tuple[str, ...] = ()
    """The answer ends before the first of them."""
    thinking_is_open: bool = False
    """The generation prompt already opened a thought."""
    tools: tuple[ToolSpec, ...] = ()
    """The offered tools: formats that write all arguments as text take their types from here."""
    forced_text: str = ""
    """A beginning that was put behind the generation prompt and not sampled (`Renderer.forced_text`)."""
    after: Role = "user"
    """The role of the message that is answered: some templates have another generation prompt after tool results."""


class AnswerReader:
    """Decodes sampled tokens and cuts them into pieces. Feed tokens without the stop token; then `finish`."""

    def __init__(self, decoder: TextDecoder, parser: AnswerParser, stop_strings: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop_strings = _StopStrings(tuple(stop_strings))
        self._parser = parser
        self._pieces: list[Piece] = []

    @property
    def stopped(self) -> bool:
        """The answer is complete: what the engine samples from here on is not part of it."""
        return self._stop_strings.met or self._parser.ended

    def push(self, token_ids: Sequence[int]) -> list[Piece]:
        return self._record(self._parser.push(self._stop_strings.push(self._decoder.push(token_ids))))

    def finish(self) -> list[Piece]:
        text = self._stop_strings.push(self._decoder.finish()) + self._stop_strings.finish()
        return self._record([*self._parser.push(text), *self._parser.finish()])

    def answer(self) -> ParsedAnswer:
        """Everything read so far."""
        thinking = [piece.text for piece in self._pieces if isinstance(piece, ThinkingPiece)]
        message = Message(
            "assistant",
            text="".join(piece.text for piece in self._pieces if isinstance(piece, TextPiece)),
            thinking="".join(thinking) if thinking else None,
            tool_calls=tuple(piece.call for piece in self._pieces if isinstance(piece, CallPiece)),
        )
        return ParsedAnswer(message, tuple(self._parser.errors))

    def _record(self, pieces: list[Piece]) -> list[Piece]:
        self._pieces.extend(pieces)
        return pieces


class AnswerParser:
    """Text to pieces. Nothing that may still become a tag or white space beside a tool call is given out.

    White space beside a tool call belongs to the format, not to the answer, and is dropped. Text that was forced is
    read first: what it opens is read whole, but its own white space and thinking tags are no pieces of the answer.
    """

    def __init__(
        self, rules: ReadingRules, tool_format: ToolFormat = HERMES, thinking_tags: ThinkingTags = THINK
    ) -> None:
        self.errors: list[str] = []
        self.ended = False
        self._rules = rules
        self._format = tool_format
        self._tags = thinking_tags
        self._buffer = ""
        self._mode = self._in_thinking if rules.thinking_is_open else self._at_start
        self._calls = 0
        self._call_ids: set[str] = set()
        self._after_call = False
        self._at_boundary = True
        """Nothing but thinking, calls and white space so far, or since the last call."""
        self._searched = 0
        """How much of an unfinished call was searched for its end: long arguments are not read again and again."""
        self._final = False
        self.push(rules.forced_text)

    def push(self, text: str) -> list[Piece]:
        self._buffer += text
        pieces: list[Piece] = []
        while not self.ended and (step := self._mode()) is not None:
            pieces.extend(step)
        if self.ended:
            self._buffer = ""
        return [piece for piece in pieces if isinstance(piece, CallPiece) or piece.text]

    def finish(self) -> list[Piece]:
        self._final = True
        pieces = self.push("")
        rest, self._buffer = self._buffer, ""
        if not rest or (self._after_call and not rest.strip()):
            return pieces
        return [*pieces, ThinkingPiece(rest) if self._mode == self._in_thinking else TextPiece(rest)]

    # Each mode consumes a part of the buffer and returns pieces, or None when it needs more text.

    def _at_start(self) -> list[Piece] | None:
        text = self._buffer.lstrip()
        if text.startswith(self._tags.open):
            self._buffer = text[len(self._tags.open) :]
            self._mode = self._in_thinking
        elif self._tags.open.startswith(text) and not self._final:
            return None
        else:
            self._mode = self._in_text
        return []

    def _in_thinking(self) -> list[Piece] | None:
        thought, closed, rest = self._buffer.partition(self._tags.close)
        if closed:
            self._buffer = rest
            self._mode = self._after_thinking
            return [ThinkingPiece(thought)]
        return self._give_out(len(thought) - held_back(thought, (self._tags.close,)), ThinkingPiece)

    def _after_thinking(self) -> list[Piece] | None:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return None
        self._mode = self._in_text
        return []

    def _in_text(self) -> list[Piece] | None:
        if not self._rules.tool_calls:
            return self._give_out(len(self._buffer), TextPiece)
        found = self._format.find_call(self._buffer, boundary=self._at_boundary)
        # The white space before a call stays in the buffer: if the call turns out invalid, it is text again.
        visible = self._buffer[: found.start].rstrip()
        if not found.opened:
            return self._give_out(len(visible), TextPiece)
        self._mode, self._searched = self._in_call, 0
        return self._give_out(len(visible), TextPiece) or []

    def _in_call(self) -> list[Piece] | None:
        if not self._final and not self._may_have_ended():
            return None
        lead = len(self._buffer) - len(self._buffer.lstrip())
        reading = self._format.read(self._buffer[lead:], self._rules.tools, final=self._final)
        if reading is None:
            return None
        raw, self._buffer = self._buffer[: lead + reading.length], self._buffer[lead + reading.length :]
        self._mode = self._in_text
        self._calls += max(1, len(reading.calls)) if reading.calls or reading.error else 0
        if reading.error or reading.is_text:
            if reading.error:
                self.errors.append(f"tool call {self._calls} {reading.error}")
            self._after_call = self._at_boundary = False
            return [TextPiece(raw)]
        self._after_call = self._at_boundary = True
        calls = reading.calls if self._rules.parallel_tool_calls else reading.calls[:1]
        self.ended = bool(calls) and not self._rules.parallel_tool_calls
        return [CallPiece(self._with_own_id(call)) for call in calls]

    def _may_have_ended(self) -> bool:
        endings = self._format.endings
        start = max(0, self._searched - max(map(len, endings)) + 1)
        self._searched = len(self._buffer)
        return any(self._buffer.find(ending, start) >= 0 for ending in endings)

    def _with_own_id(self, call: ToolCall) -> ToolCall:
        """Models that write ids repeat themselves; agents tell calls apart by them."""
        if call.id in self._call_ids:
            call = replace(call, id=f"call_{secrets.token_hex(8)}")
        self._call_ids.add(call.id)
        return call

    def _give_out(self, length: int, kind: type[TextPiece] | type[ThinkingPiece]) -> list[Piece] | None:
        if length == 0:
            return None
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        self._after_call = False
        if kind is TextPiece:
            self._at_boundary = False
        return [kind(text)]


@dataclass(slots=True)
class _StopStrings:
    """Lets text through up to the first stop string, holding back what may begin one."""

    strings: tuple[str, ...]
    met: bool = False
    _held: str = field(default="", init=False)

    def push(self, text: str) -> str:
        if self.met:
            return ""
        text = self._held + text
        starts = [start for string in self.strings if (start := text.find(string)) >= 0]
        if starts:
            self.met, self._held = True, ""
            return text[: min(starts)]
        certain = len(text) - held_back(text, self.strings)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held
