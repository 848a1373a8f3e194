"""Rounds: the same passes on all ranks at the same time, although their batches differ.

Ranks that gather weights layer by layer, or send tokens to each other's experts, must run forward and backward passes
in the same order, or they wait for each other for ever. A round is a forward pass on every rank or a backward pass on
every rank. A rank that has no pass of the kind does it on a batch of one token without targets, whose gradient is zero.

All ranks know all batches, so each makes the whole table for itself. On a rank, batches keep their order, so what is
alive at any time is what one process would keep, and some single tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from upspiral.trainer.depth_first import Lane, Work, is_deep, lanes_of
from upspiral.trainer.forest import ForestBatch

PassKind = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one rank does in one round. Of a batch, the forward turn is `lane.begin(work)` and a loss for
    `lane.keep_loss`, which must lead back through the whole model also where there are no targets; the backward turn is
    `lane.end(work)`."""

    kind: PassKind
    lane: Lane
    work: Work
    fills: bool
    """Whether the batch only fills the round."""

    @property
    def batch(self) -> ForestBatch:
        return self.lane.batches[self.work.batch]


def turns(
    batches: Sequence[ForestBatch], place: int, places: int, *, recompute: bool = False, alike: bool = False
) -> Iterator[Turn]:
    """What the rank at `place` of `places` does for one minibatch: turns of the same kinds, in the same order, at every
    place. Lane n is that of place n % places.

    `recompute`: all layers are computed again in the backward pass. `alike`: they are for every batch where they must
    be for one, as layers need that speak to other ranks themselves.
    """
    dealt = [lanes_of([batch for batch in batches if batch.lane % places == each]) for each in range(places)]
    recompute = recompute or (alike and any(is_deep(lane.batches) for lanes in dealt for lane in lanes))
    own = lanes_of([batch for batch in batches if batch.lane % places == place], recompute=recompute)
    fillers: list[Turn] = []
    passes = iter([(lane, each) for lane in own for each in _passes(lane)])
    coming = next(passes, None)
    for kind in kinds_of_rounds([[each[0] for lane in lanes for each in _passes(lane)] for lanes in dealt]):
        if coming is not None and coming[1][0] == kind:
            yield Turn(kind, coming[0], coming[1][1], fills=False)
            coming = next(passes, None)
        elif kind == "forward":
            fillers.append(Turn(kind, Lane([filler()], recompute=recompute), Work("both", 0), fills=True))
            yield fillers[-1]
        else:
            yield replace(fillers.pop(), kind=kind)


def kinds_of_rounds(passes: Sequence[Sequence[PassKind]]) -> list[PassKind]:
    """The kind of each round, from what every rank has to do in its order. Forward passes come first, since a rank can
    always fill one up: then all ranks have equally many passes open, and who has no backward pass left to do in its
    order has a filler's."""
    kinds: list[PassKind] = []
    at, open_passes = [0] * len(passes), 0
    while open_passes or any(place < len(own) for place, own in zip(at, passes, strict=True)):
        coming = [own[place] if place < len(own) else None for place, own in zip(at, passes, strict=True)]
        kinds.append("forward" if "forward" in coming else "backward")
        open_passes += 1 if kinds[-1] == "forward" else -1
        at = [place + (each == kinds[-1]) for place, each in zip(at, coming, strict=True)]
    return kinds


def filler() -> ForestBatch:
    """One token without targets or context."""
    zero, none, nothing = np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0)
    return ForestBatch(
        token_ids_T=zero, positions_T=zero, routes_TLK=np.empty((1, 0, 0), np.int16),
        node_start_N=zero, node_length_N=zero + 1, node_parent_N=zero - 1, sources_M=none, targets_M=none,
        positive_M=nothing, negative_M=nothing, token_weight_M=nothing, behavior_logprobs_M=nothing, rollout_M=none,
        rollout_ids=(),
    )  # fmt: skip


def _passes(lane: Lane) -> list[tuple[PassKind, Work]]:
    """The lane's work in passes: `both` is a forward and then a backward one."""
    kinds: dict[str, list[PassKind]] = {
        "forward": ["forward"], "backward": ["backward"], "both": ["forward", "backward"]
    }  # fmt: skip
    return [(kind, work) for work in lane.remaining for kind in kinds[work.kind]]
