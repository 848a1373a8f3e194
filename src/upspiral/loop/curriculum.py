"""Which training tasks a step takes: those whose groups are likely to say something.

A group learns only when its rewards differ. With success probability p of a kind of task, a group of G rollouts does so
with probability 1 - p^G - (1-p)^G. We keep a Beta posterior of p for each kind, weighted towards recent steps, and draw
each task from a few candidates with the expected value of that probability as weight. An untried kind has a flat prior,
hence a high weight, and a kind that was always or never solved comes back as its evidence fades.

What it does not do: tell apart tasks of one kind, or change what a held-out task is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import exp, lgamma
from random import Random

from upspiral.env.base import Task

MEMORY = 0.8
"""What a step's evidence weighs one step later."""


class Curriculum:
    """Chooses the tasks of one step after another. The choice follows from the seed and the rewards observed before."""

    def __init__(
        self, task: Callable[[int], Task], *, seed: int, tasks_per_step: int, candidates: int, group_size: int
    ) -> None:
        self._task = task
        self._seed = seed
        self._tasks_per_step = tasks_per_step
        self._candidates = candidates
        self._group_size = group_size
        self._evidence: dict[str, tuple[float, float]] = {}
        """Kind -> weighted successes and failures."""

    def choose(self, step: int) -> list[Task]:
        """`tasks_per_step` different training tasks; with one candidate each, simply the next ones."""
        rng = Random(f"{self._seed}/curriculum/{step}")
        first = step * self._tasks_per_step * self._candidates
        chosen = []
        for index in range(self._tasks_per_step):
            start = first + index * self._candidates
            candidates = [self._task(number) for number in range(start, start + self._candidates)]
            weights = [self.expected_signal(candidate.kind) for candidate in candidates]
            chosen.append(rng.choices(candidates, weights)[0])
        return chosen

    def observe(self, rewards: Iterable[tuple[Task, Sequence[float]]]) -> None:
        """Takes in what a step's groups were rewarded with, once the step is collected."""
        evidence = {kind: (MEMORY * won, MEMORY * lost) for kind, (won, lost) in self._evidence.items()}
        for task, of_group in rewards:
            won, lost = evidence.get(task.kind, (0.0, 0.0))
            evidence[task.kind] = (won + sum(of_group), lost + sum(1.0 - reward for reward in of_group))
        self._evidence = evidence

    def expected_signal(self, kind: str) -> float:
        """How likely the rewards of a group of this kind differ, by what was observed."""
        won, lost = self._evidence.get(kind, (0.0, 0.0))
        a, b = won + 1.0, lost + 1.0
        return 1.0 - _all_succeed(a, b, self._group_size) - _all_succeed(b, a, self._group_size)


def _all_succeed(a: float, b: float, n: int) -> float:
    """E[p^n] for p ~ Beta(a, b), which is B(a + n, b) / B(a, b)."""
    return exp(lgamma(a + n) + lgamma(a + b) - lgamma(a) - lgamma(a + b + n))
