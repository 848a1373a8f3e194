"""Rounds: the same passes on all ranks at the same time, although their batches differ.

Ranks that gather weights layer by layer, or send tokens to each other's experts, must run forward and backward passes
in the same order, or they wait for each other for ever. A round is a forward pass on every rank, and later a backward
pass of the same batches: what came from another rank's batch needs its gradient together with it. A rank that has no
batch for a round does it with one token without targets, whose gradient is zero.

All ranks know all batches, so each makes the whole table for itself. On a rank, batches keep their order, so what is
alive at any time is what one process would keep, and some single tokens. The price: while one rank goes down a tree
that is split, others wait with what needs no keeping.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from upspiral.trainer.depth_first import Lane, Work, WorkKind, is_deep, lanes_of
from upspiral.trainer.forest import ForestBatch, plain_path

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
    coming = deque((lane, work) for lane in own for work in lane.remaining)
    opened: list[Turn] = []
    for kind in rounds([[work.kind for lane in lanes for work in lane.remaining] for lanes in dealt]):
        if kind == "backward":
            turn = opened.pop()
            if not turn.fills:
                coming.popleft()
            yield replace(turn, kind="backward")
            continue
        if coming and coming[0][1].kind == kind:
            turn = Turn("forward", *coming.popleft(), fills=False)
        else:
            turn = Turn("forward", Lane([plain_path([0])], recompute=recompute), Work("both", 0), fills=True)
        yield turn
        if kind == "both":
            yield replace(turn, kind="backward")
        else:
            opened.append(turn)


def rounds(works: Sequence[Sequence[WorkKind]]) -> list[WorkKind]:
    """The kind of each round, from what every rank has to do in its order: `forward` opens one, `backward` ends the one
    opened last, `both` does both at once. Ends come last: then every rank that has a batch in the round opened last is
    done with all that hangs below it."""
    kinds: list[WorkKind] = []
    coming = [deque(own) for own in works]
    opened: list[list[deque[WorkKind]]] = []
    """Of each round that is open, who has a batch in it."""
    while any(coming):
        following = {own[0] for own in coming if own}
        kind: WorkKind = next(each for each in ("forward", "both", "backward") if each in following)
        taking = opened.pop() if kind == "backward" else [own for own in coming if own and own[0] == kind]
        if kind == "forward":
            opened.append(taking)
        for own in taking:
            own.popleft()
        kinds.append(kind)
    return kinds
