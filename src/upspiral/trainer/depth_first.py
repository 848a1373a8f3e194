"""The order in which one lane computes its batches: a batch is kept until everything that hangs below it is done.

What is alive at any time is WHOLE batches with all that their gradients need, the one under way and the lowest on its
path; of the path above these, keys, values and each layer's input. Layers there are computed again, once, when their
turn comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from upspiral.trainer.attention import End, ForestPass
from upspiral.trainer.forest import ForestBatch

WHOLE = 3
"""Two would compute most of a path of three batches again, which flat rows of its length would not."""


WorkKind = Literal["forward", "backward", "both"]


@dataclass(frozen=True, slots=True)
class Work:
    """`forward` keeps the batch for others below it, `backward` ends that; `both` is for a batch with none below."""

    kind: WorkKind
    batch: int


def depth_first(batches: Sequence[ForestBatch]) -> Iterator[Work]:
    """What to do with the batches of one lane, in order."""
    last_use = {run.batch: number for number, batch in enumerate(batches) for run in batch.context}
    open_batches: list[int] = []
    for number in range(len(batches)):
        while open_batches and last_use[open_batches[-1]] < number:
            yield Work("backward", open_batches.pop())
        if number in last_use:
            open_batches.append(number)
            yield Work("forward", number)
        else:
            yield Work("both", number)
    for number in reversed(open_batches):
        yield Work("backward", number)


class Lane:
    """The batches of one lane while they are computed. `remaining` is the work that is left."""

    def __init__(self, batches: Sequence[ForestBatch], *, exact: bool = False, recompute: bool = False) -> None:
        self.batches = batches
        self._exact, self._recompute = exact, recompute
        self.remaining = deque(depth_first(batches))
        self._below = _longest_below(batches)
        self._passes: list[ForestPass | None] = [None] * len(batches)
        self._losses: dict[int, Tensor] = {}

    def begin(self, work: Work) -> ForestPass:
        """The pass of a batch, for its forward; its context must have begun and not ended."""
        begun = ForestPass(
            self.batches[work.batch],
            self._passes,
            keeps=work.kind == "forward",
            exact=self._exact,
            recompute=self._recompute or self._below[work.batch] >= WHOLE,
        )
        self._passes[work.batch] = begun
        return begun

    def keep_loss(self, work: Work, loss: Tensor) -> None:
        """For the batch's backward."""
        self._losses[work.batch] = loss

    def end(self, work: Work) -> None:
        """The batch's backward; afterwards nothing of it is kept."""
        self._taken(work).backward(self._losses.pop(work.batch, None))

    def ends(self, work: Work) -> list[End]:
        """Where the batch's backward begins, instead of doing it; afterwards nothing of the batch is kept."""
        return self._taken(work).ends(self._losses.pop(work.batch, None))

    def _taken(self, work: Work) -> ForestPass:
        taken, self._passes[work.batch] = self._passes[work.batch], None
        assert taken is not None
        return taken


def is_deep(batches: Sequence[ForestBatch]) -> bool:
    """Whether some batch of a lane has so many below it that its layers are computed again."""
    return any(below >= WHOLE for below in _longest_below(batches))


def _longest_below(batches: Sequence[ForestBatch]) -> list[int]:
    """For each batch, how many are on the longest path that goes on below it. Contexts come before what needs them."""
    below = [0] * len(batches)
    for number, batch in reversed(list(enumerate(batches))):
        for run in batch.context:
            below[run.batch] = max(below[run.batch], below[number] + 1)
    return below


def lanes_of(batches: Sequence[ForestBatch], *, exact: bool = False, recompute: bool = False) -> list[Lane]:
    """The lanes of one minibatch. `exact`, `recompute`: see `ForestPass`."""
    dealt = ([batch for batch in batches if batch.lane == n] for n in sorted({batch.lane for batch in batches}))
    return [Lane(part, exact=exact, recompute=recompute) for part in dealt]
