"""Agents send their whole history with every request. What of it was read before is not read again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from upspiral.gateway.dialects.memory import Memory
from upspiral.types import Message

ReadEntry = Callable[[Mapping[str, Any], str], Sequence[Message]]
"""The messages that one entry at a place of the body holds, whatever stands around it. Raises FieldError."""
_OPENING = 2
"""So many entries, mostly a system prompt and a question, tell the conversations of a rollout apart."""


@dataclass(frozen=True, slots=True)
class _Reading:
    read_entry: ReadEntry
    """Dialects mean other things by the same entry."""
    text: bytes
    """The entries as JSON, without the bracket that closes the list."""
    entries: int
    messages: tuple[Message, ...]


def read_entries(
    entries: Sequence[Mapping[str, Any]], field: str, read_entry: ReadEntry, memory: Memory
) -> tuple[Message, ...]:
    """The messages of all entries. Those that the last request of the same conversation began with are the same objects
    again. Raises what `read_entry` raises."""
    text, key = _json(entries), f"read {hashlib.blake2b(_json(entries[:_OPENING]), digest_size=16).hexdigest()}"
    known: _Reading | None = memory.find(key)
    if known is None or known.read_entry is not read_entry or not _continues(text, known.text):
        known = _Reading(read_entry, b"", 0, ())
    new = [
        message
        for index, entry in enumerate(entries[known.entries :], start=known.entries)
        for message in read_entry(entry, f"{field}[{index}]")
    ]
    messages = (*known.messages, *new)
    # The messages hold the text once more.
    memory.keep(key, _Reading(read_entry, text, len(entries), messages), 2 * len(text))
    return messages


def _json(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """To be compared instead of the objects: to Python, 1 equals True and 1.0."""
    return orjson.dumps(entries)[:-1]


def _continues(text: bytes, before: bytes) -> bool:
    return text.startswith(before) and text[len(before) : len(before) + 1] in (b"", b",")
