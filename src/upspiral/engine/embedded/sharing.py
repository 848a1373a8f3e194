"""Which keys and values a decoding step reads once for several sequences, and which sequences it reads together.

On CPU the cost of attention is reading keys and values. The tokens of the decoding slots form a tree: a run that
several slots have in common (the system prompt of all, the question of a group) is read from one of them, for all
below it; what is left, its own tail, is read slot by slot. Neighbours whose tails are about alike go in one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upspiral.engine.embedded.cache import SlotCache

_WORTH_SHARING_TOKENS = 48
_CALL_TOKENS = 160
"""One more call takes as long as reading so many tokens of one slot (measured: 25 us and 0.16 us)."""


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Positions begin .. end hold the same in all `members`; they are read from `slot`, one of them."""

    begin: int
    end: int
    slot: int
    members: Tensor
    """[at least 2] slots"""


@dataclass(frozen=True, slots=True)
class Span:
    """Slots first .. last (exclusive), of which positions begin .. end hold every tail."""

    first: int
    last: int
    begin: int
    end: int

    @property
    def cost(self) -> int:
        return _CALL_TOKENS + (self.last - self.first) * (self.end - self.begin)

    def with_next(self, other: Span) -> Span:
        return Span(self.first, other.last, min(self.begin, other.begin), max(self.end, other.end))


@dataclass(frozen=True, slots=True)
class Sharing:
    """Invariant: a slot's runs cover its positions from 0 to where its tail begins, each position once."""

    runs: tuple[SharedRun, ...]
    spans: tuple[Span, ...]
    """Together slots 0 .. highest decoding one, in order."""
    tails: NDArray[np.int64]
    """[slots 0 .. highest] where each slot's tail begins."""


def find_sharing(cache: SlotCache, slots: NDArray[np.int64], device: torch.device) -> Sharing:
    """For decoding `slots`, ascending. Elsewhere than on CPU nothing is shared: there keys are read faster than more
    calls and their joining are launched."""
    tails = np.zeros(int(slots.max(initial=-1)) + 1, np.int64)
    if not len(slots):
        return Sharing((), (), tails)
    ends = cache.lengths[slots] + 1
    if device.type != "cpu":
        return Sharing((), (Span(0, len(tails), 0, int(ends.max())),), tails)
    runs = tuple(_runs(cache, cache.current(slots), 0, tails))
    return Sharing(runs, tuple(_spans(slots, tails, ends)), tails)


def _runs(cache: SlotCache, slots: NDArray[np.int64], covered: int, tails: NDArray[np.int64]) -> Iterator[SharedRun]:
    """Runs below position `covered`, up to which runs that were found cover all these slots; notes their tails."""
    if len(slots) < 2:
        return
    common = cache.common_prefix(slots)
    if common - covered >= _WORTH_SHARING_TOKENS:
        yield SharedRun(covered, common, int(slots[0]), torch.from_numpy(slots))
        tails[slots] = covered = common
    inside = slots[cache.lengths[slots] > common]
    following = cache.ids[inside, common]
    for token_id in np.unique(following):
        yield from _runs(cache, inside[following == token_id], covered, tails)


def _spans(slots: NDArray[np.int64], tails: NDArray[np.int64], ends: NDArray[np.int64]) -> Iterator[Span]:
    """Neighbours together where that costs less than one call more. Idle slots between go with the one before."""
    bounds = [0, *slots[1:].tolist(), len(tails)]
    each = [
        Span(first, last, int(tails[slot]), int(end))
        for first, last, slot, end in zip(bounds[:-1], bounds[1:], slots, ends, strict=True)
    ]
    span = each[0]
    for following in each[1:]:
        joined = span.with_next(following)
        if joined.cost <= span.cost + following.cost:
            span = joined
        else:
            yield span
            span = following
    yield span
