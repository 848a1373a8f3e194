"""Which training tasks a step takes: those whose groups are likely to say something.

A group learns only when its rewards differ. For each kind of task we count how many of its groups had signal, weighted
towards recent steps, and draw each task from a few candidates with that share as weight. A kind that was not tried yet
counts as one half, and a kind that is always or never solved comes back as its evidence fades.

Groups are counted, not successes: a kind of which half the tasks are always solved and half never has a success rate of
one half and no signal at all.

What it does not do: tell apart tasks of one kind, or change what a held-out task is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

from upspiral.env.base import Task

MEMORY = 0.8
"""What a step's evidence weighs one step later."""


class Curriculum:
    """Chooses the tasks of one step after another. The choice follows from the seed and the rewards observed before."""

    def __init__(self, task: Callable[[int], Task], *, seed: int, tasks_per_step: int, candidates: int) -> None:
        self._task = task
        self._seed = seed
        self._tasks_per_step = tasks_per_step
        self._candidates = candidates
        self._evidence: dict[str, tuple[float, float]] = {}
        """Kind -> weighted groups with signal, and weighted groups."""

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
        evidence = {kind: (MEMORY * told, MEMORY * tried) for kind, (told, tried) in self._evidence.items()}
        for task, of_group in rewards:
            told, tried = evidence.get(task.kind, (0.0, 0.0))
            evidence[task.kind] = (told + (len(set(of_group)) > 1), tried + 1.0)
        self._evidence = evidence

    def expected_signal(self, kind: str) -> float:
        """How likely the rewards of a group of this kind differ, by what was observed."""
        told, tried = self._evidence.get(kind, (0.0, 0.0))
        return (told + 0.5) / (tried + 1.0)
