"""The sums of gradients over the microbatches of one minibatch.

A weight's gradient is added as soon as it is complete, while the backward pass goes on below it: nobody but the sums
holds the gradients of a whole model. Lanes add at the same time, but to the same sum in their order, so its bits do not
depend on which was first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from upspiral.trainer.turns import Turns


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A weight that backward passes leave gradients on, and what is trained behind it."""

    weight: Tensor
    first: int
    """The number of the sum that the first of its gradients goes into; the others follow."""
    gradients: Callable[[Tensor], Sequence[Tensor]]
    """From the gradient of the weight to those of what is trained."""


def whole_weights(model: Any) -> list[Source]:
    """Of a model, or a lane's shell of it, all of whose trainable weights are trained themselves."""
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return [Source(weight, number, lambda gradient: (gradient,)) for number, weight in enumerate(trained)]


class GradientSums:
    """A sum for each trained tensor, by its number.

    Gradients are added in float32 whatever their precision, so that splitting a batch loses nothing. A single one stays
    as it came until it is taken: of a few tokens, widening it would take as long as a quarter of the pass that made it.
    """

    def __init__(self, lanes: Sequence[Sequence[Source]] = ()) -> None:
        """`lanes`: the sources in each lane's model, the same in all."""
        self._lanes = lanes
        self._sums: dict[int, Tensor] = {}
        self._scale = 1.0

    @contextmanager
    def collected(self, lanes: Iterable[int]) -> Iterator[Turns]:
        """Within it, backward passes leave their gradients in the sums: of each of the `lanes` named one pass, in
        `Turns.taken_by`. After an error the sums are empty."""
        turns = Turns(lanes)
        hooks = [
            source.weight.register_post_accumulate_grad_hook(partial(self._collect, turns, lane, source))
            for lane, sources in enumerate(self._lanes)
            for source in sources
        ]
        try:
            yield turns
        except BaseException:
            self.drop()
            raise
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def add(self, number: int, gradient: Tensor) -> None:
        """Keeps the gradient, or adds it to what is there, which changes in place."""
        total = self._sums.get(number)
        self._sums[number] = gradient if total is None else _widened(total).add_(gradient)

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Lets `take` scale the sums to a global norm of at most `max_norm`. Returns the norm before; when it is not
        finite nothing is scaled."""
        sums = [self._sums[number] for number in sorted(self._sums)]
        if not sums:
            return 0.0
        norms = torch.stack([torch.linalg.vector_norm(total, dtype=wide(total.dtype)) for total in sums])
        norm = torch.linalg.vector_norm(norms).item()
        self._scale = max_norm / norm if max_norm < norm < float("inf") else 1.0
        return norm

    @torch.no_grad()
    def take(self, number: int) -> Tensor | None:
        """A sum after clipping, in float32 at least, which is kept no longer; None where no gradient came."""
        total = self._sums.pop(number, None)
        return total if total is None else _widened(total).mul_(self._scale)

    def drop(self) -> None:
        """Forgets all sums."""
        self._sums.clear()
        self._scale = 1.0

    @torch.no_grad()
    def _collect(self, turns: Turns, lane: int, source: Source, weight: Tensor) -> None:
        assert weight.grad is not None
        gradients, weight.grad = source.gradients(weight.grad), None
        with turns.at(lane, source.first):
            for number, gradient in enumerate(gradients, source.first):
                self.add(number, gradient)


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums and masters are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(wide(tensor.dtype))
