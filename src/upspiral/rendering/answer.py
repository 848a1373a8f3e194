"""What the model wrote, read while it arrives: thinking, text and Hermes tool calls.

Streaming and not streaming go through the same reader, so they cannot disagree.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upspiral.rendering.text_decoder import TextDecoder
from upspiral.types import Message, ToolCall

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
TAGS = (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE)


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
    """Off: `<tool_call>` is plain text, because no tools were offered."""
    parallel_tool_calls: bool = True
    """Off: the answer ends after its first tool call."""
    stop_strings: tuple[str, ...] = ()
    """The answer ends before the first of them."""
    thinking_is_open: bool = False
    """The generation prompt already wrote `<think>`."""


class AnswerReader:
    """Decodes sampled tokens and cuts them into pieces. Feed tokens without the stop token; then `finish`."""

    def __init__(self, decoder: TextDecoder, rules: ReadingRules) -> None:
        self._decoder = decoder
        self._stop_strings = _StopStrings(rules.stop_strings)
        self._parser = AnswerParser(rules)
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

    White space beside a tool call belongs to the format, not to the answer, and is dropped.
    """

    def __init__(self, rules: ReadingRules) -> None:
        self.errors: list[str] = []
        self.ended = False
        self._rules = rules
        self._buffer = ""
        self._mode = self._in_thinking if rules.thinking_is_open else self._at_start
        self._calls = 0
        self._after_call = False

    def push(self, text: str) -> list[Piece]:
        if self.ended:
            return []
        self._buffer += text
        pieces: list[Piece] = []
        while not self.ended and (step := self._mode()) is not None:
            pieces.extend(step)
        return [piece for piece in pieces if isinstance(piece, CallPiece) or piece.text]

    def finish(self) -> list[Piece]:
        rest, self._buffer = self._buffer, ""
        if self._mode == self._in_thinking:
            return [ThinkingPiece(rest)] if rest else []
        if self._mode == self._in_call:
            self.errors.append(f"tool call {self._calls + 1} is not closed: {CALL_CLOSE} is missing")
        elif self._after_call and not rest.strip():
            return []
        return [TextPiece(rest)] if rest else []

    # Each mode consumes a part of the buffer and returns pieces, or None when it needs more text.

    def _at_start(self) -> list[Piece] | None:
        text = self._buffer.lstrip()
        if text.startswith(THINK_OPEN):
            self._buffer = text[len(THINK_OPEN) :]
            self._mode = self._in_thinking
        elif THINK_OPEN.startswith(text):
            return None
        else:
            self._mode = self._in_text
        return []

    def _in_thinking(self) -> list[Piece] | None:
        thought, closed, rest = self._buffer.partition(THINK_CLOSE)
        if closed:
            self._buffer = rest
            self._mode = self._after_thinking
            return [ThinkingPiece(thought)]
        return self._give_out(len(thought) - _held_back(thought, (THINK_CLOSE,)), ThinkingPiece)

    def _after_thinking(self) -> list[Piece] | None:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return None
        self._mode = self._in_text
        return []

    def _in_text(self) -> list[Piece] | None:
        if not self._rules.tool_calls:
            return self._give_out(len(self._buffer), TextPiece)
        start = self._buffer.find(CALL_OPEN)
        if start < 0:
            visible = self._buffer[: len(self._buffer) - _held_back(self._buffer, (CALL_OPEN,))].rstrip()
            return self._give_out(len(visible), TextPiece)
        self._mode = self._in_call
        # The white space before the call stays in the buffer: if the call turns out invalid, it is text again.
        visible = self._buffer[:start].rstrip()
        return self._give_out(len(visible), TextPiece) or []

    def _in_call(self) -> list[Piece] | None:
        raw, closed, rest = self._buffer.partition(CALL_CLOSE)
        if not closed:
            return None
        self._buffer = rest
        self._mode = self._in_text
        self._calls += 1
        call = _parse_call(raw.lstrip().removeprefix(CALL_OPEN))
        if isinstance(call, str):
            self.errors.append(f"tool call {self._calls} {call}")
            self._after_call = False
            return [TextPiece(raw + closed)]
        self._after_call = True
        if not self._rules.parallel_tool_calls:
            self.ended, self._buffer = True, ""
        return [CallPiece(call)]

    def _give_out(self, length: int, kind: type[TextPiece] | type[ThinkingPiece]) -> list[Piece] | None:
        if length == 0:
            return None
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        self._after_call = False
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
        certain = len(text) - _held_back(text, self.strings)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _held_back(text: str, tags: Sequence[str]) -> int:
    """How many last characters of the text may be the beginning of one of the tags."""
    for length in range(min(len(text), max(map(len, tags), default=1) - 1), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in tags):
            return length
    return 0


def _parse_call(text: str) -> ToolCall | str:
    """The call, or what is wrong with it."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        # Escapes can smuggle in half a surrogate pair, which no HTTP answer could carry.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON: {error}: {text.strip()[:200]!r}"
    if not isinstance(value, dict):
        return f"is not a JSON object but {type(value).__name__}"
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or not name:
        return f'has no "name" that is a string; its keys are {sorted(value)}'
    if not isinstance(arguments, dict):
        return f'({name}): "arguments" is not a JSON object but {type(arguments).__name__}'
    return ToolCall(f"call_{secrets.token_hex(8)}", name, json.dumps(arguments, ensure_ascii=False))


def format_tool_call(call: Mapping[str, Any]) -> str:
    """The text of `{"name": ..., "arguments": {...}}` in Hermes format."""
    body = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
    return f"{CALL_OPEN}\n{body}\n{CALL_CLOSE}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
