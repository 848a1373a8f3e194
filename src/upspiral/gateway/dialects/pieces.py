"""A finished answer in the order in which it was written, for dialects whose answers are lists of blocks or items."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Sequence

from upspiral.gateway.generation import AnswerEvent, Generation
from upspiral.rendering.answer import CallPiece, Piece, TextPiece, ThinkingPiece

_SEAL = "up1"
"""Begins everything that we hand to a client to carry for us."""


def joined_pieces(events: Iterable[AnswerEvent]) -> list[Piece]:
    """The pieces of an exchange with one answer; neighbours of the same kind become one."""
    joined: list[Piece] = []
    texts: list[str] = []
    kind: type[TextPiece] | type[ThinkingPiece] | None = None
    for piece in (piece for event in events for piece in event.pieces):
        if kind is not None and type(piece) is not kind:
            joined.append(kind("".join(texts)))
            kind = None
        if isinstance(piece, CallPiece):
            joined.append(piece)
            continue
        if kind is None:
            kind, texts = type(piece), []
        texts.append(piece.text)
    if kind is not None:
        joined.append(kind("".join(texts)))
    return joined


class ThinkingCount:
    """How many sampled tokens are thinking. A token that was held back counts for what it turned out to be; one that
    ends the thinking counts as thinking if its chunk began with some."""

    def __init__(self) -> None:
        self.tokens = 0
        self._pending = 0
        self._thinking = False

    def take(self, event: AnswerEvent) -> None:
        self._pending += event.tokens
        if event.pieces:
            self._thinking = isinstance(event.pieces[0], ThinkingPiece)
            self.tokens += self._pending if self._thinking else 0
            self._pending = 0
            self._thinking = isinstance(event.pieces[-1], ThinkingPiece)
        elif event.end:
            self.tokens += self._pending if self._thinking else 0
            self._pending = 0


def met_stop_string(
    generation: Generation, stop_strings: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> str | None:
    """The stop string that ended an answer, if one did: the first in what was sampled."""
    if not stop_strings:
        return None
    text = decode(generation.token_ids)
    found = [(start, string) for string in stop_strings if (start := text.find(string)) >= 0]
    return min(found)[1] if found else None


def carried(purpose: str, text: str) -> str:
    """The text in a form that a client hands back without looking into it. Encoded, not encrypted: it is the rollout's
    own."""
    return f"{_SEAL}.{purpose}.{base64.urlsafe_b64encode(text.encode()).decode()}"


def carried_text(purpose: str, value: object) -> str | None:
    """What `carried` was given; None for a value that somebody else made."""
    if not isinstance(value, str):
        return None
    seal, _, rest = value.partition(".")
    given, _, encoded = rest.partition(".")
    if seal != _SEAL or given != purpose:
        return None
    try:
        return base64.b64decode(encoded, altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
