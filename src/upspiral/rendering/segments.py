"""Which tokens of a rendered conversation belong to which message."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upspiral.errors import TemplateError
from upspiral.rendering.encoder import Encoded
from upspiral.types import Message, Role


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The tokens that one message adds to a prompt."""

    role: Role
    message: Message
    token_ids: NDArray[np.int32]


def cut_segments(whole: Encoded, ends: Sequence[int], messages: Sequence[Message], start: int = 0) -> list[Segment]:
    """Cuts the tokens from index `start` on at the end of each message's text, `ends` in characters.

    Joined, the segments are always those tokens. Each has at least one token: where a template writes nothing of its
    own for a message (a system prompt that it puts into the next turn), the cut is a guess. Raises TemplateError when
    there are fewer tokens than messages.
    """
    ids = np.asarray(whole.ids, np.int32)
    if len(ids) - start < len(messages):
        raise TemplateError(f"the chat template renders {len(messages)} messages as {len(ids) - start} tokens")
    segments: list[Segment] = []
    for index, (message, end) in enumerate(zip(messages, ends, strict=True)):
        left = len(messages) - index - 1
        stop = len(ids) if left == 0 else min(max(_token_at(whole.starts, end), start + 1), len(ids) - left)
        segments.append(Segment(message.role, message, ids[start:stop]))
        start = stop
    return segments


def _token_at(starts: Sequence[int], end: int) -> int:
    """The first token that does not end before a character. One that reaches across it belongs to what follows."""
    index = bisect_left(starts, end)
    if index < len(starts) and index > 0 and starts[index] > end:
        index = bisect_left(starts, starts[index - 1])
    return index


def shared_length(text: str, other: str) -> int:
    """How many first characters two texts have in common."""
    low, high = 0, min(len(text), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
