"""Several microbatches side by side on one machine's cores, each lane on a thread of its own.

On a few cores this beats giving all cores to one microbatch: most operations of a small model are too short to be
worth splitting (measured on two cores: 1.3 times one thread's speed with two OpenMP threads).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import nn

from upspiral.weights.cpu import use_threads

Result = TypeVar("Result")


class Lanes:
    """`models[0]` is the model itself; the others are shells around the same weights with gradients of their own.

    What belongs to a lane is computed on its own model from beginning to end, whichever others have work left, so sums
    over lanes in their order are reproducible.
    """

    def __init__(self, model: Any, count: int) -> None:
        self.models = [model, *(_shell(model) for _ in range(count - 1))]
        self._pool = ThreadPoolExecutor(count - 1, "trainer-lane", use_threads, (1,)) if count > 1 else None

    def __len__(self) -> int:
        return len(self.models)

    def run(self, work: Callable[[Any, int], Result], numbers: Sequence[int]) -> list[Result]:
        """`work(model of the lane, its number)` for the lanes of these numbers, all at once; one alone has all cores.
        What one raises comes out when all have ended."""
        if self._pool is None or len(numbers) == 1:
            return [work(self.models[number], number) for number in numbers]
        others = [self._pool.submit(work, self.models[number], number) for number in numbers[1:]]
        before = torch.get_num_threads()
        use_threads(1)
        try:
            first = work(self.models[numbers[0]], numbers[0])
        finally:
            wait(others)
            use_threads(before)
        return [first, *(other.result() for other in others)]


def _shell(model: Any) -> Any:
    """A copy of the module tree whose parameters share storage with the original's and have gradients of their own."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)
