"""Which rollouts the report shows: a few that tell what training changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from upspiral.dashboard.run_data import RunData
from upspiral.types import Rollout, RolloutCredit

SOLVED = 1.0
"""A reward from which a rollout counts as a success."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One held-out task before and after training."""

    title: str
    before: Rollout
    after: Rollout


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """Rollouts of one task compared with each other in one step, best first."""

    group_id: str
    step: int
    size: int
    rollouts: tuple[Rollout, ...]
    """The best and the worst of the group."""


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """Held-out tasks that were judged both times."""

    both: int
    before_only: int
    after_only: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.before_only + self.after_only + self.neither


def solved(rollout: Rollout) -> bool:
    return rollout.reward is not None and rollout.reward >= SOLVED


def _judged(rollout: Rollout) -> bool:
    return rollout.reward is not None


def matched(run: RunData) -> list[tuple[Rollout, Rollout]]:
    """Rollouts of the same held-out task at the first and the last evaluation, both judged; of repeats the newest."""
    if len(run.evaluations) < 2:
        return []
    first, last = (
        {rollout.task_id: rollout for rollout in run.rollouts(split="eval", step=line["step"]) if _judged(rollout)}
        for line in (run.evaluations[0], run.evaluations[-1])
    )
    return [(before, last[task_id]) for task_id, before in first.items() if task_id in last]


def paired_counts(pairs: Sequence[tuple[Rollout, Rollout]]) -> PairedCounts:
    """How the outcomes of the pairs agree."""
    outcomes = [(solved(before), solved(after)) for before, after in pairs]
    return PairedCounts(
        *(outcomes.count(cell) for cell in [(True, True), (True, False), (False, True), (False, False)])
    )


def telling_pairs(pairs: Sequence[tuple[Rollout, Rollout]]) -> list[Pair]:
    """Up to three tasks that training solved, one that it lost and one still wrong."""
    wanted = [
        ("wrong, then right", False, True, 3),
        ("right, then wrong", True, False, 1),
        ("still wrong", False, False, 1),
    ]
    chosen: list[Pair] = []
    for title, was, now, count in wanted:
        fitting = [pair for pair in pairs if (solved(pair[0]), solved(pair[1])) == (was, now)]
        chosen += [Pair(title, before, after) for before, after in _spread(fitting, count)]
    return chosen


def training_group(run: RunData, show: int = 4) -> TrainingGroup | None:
    """The most divided group of the last step that trained on one: as many right as wrong, if there is such."""
    if run.store is None:
        return None
    for line in reversed(run.steps):
        credited = _trained_groups(run.store.credits(step=line["step"]))
        groups = {group: [run.store.rollout(one.rollout_id) for one in members] for group, members in credited.items()}
        if not groups:
            continue
        group_id, rollouts = max(groups.items(), key=lambda item: _division(item[1]))
        ranked = sorted(rollouts, key=lambda rollout: rollout.reward or 0.0, reverse=True)
        half = show // 2
        shown = ranked if len(ranked) <= show else [*ranked[:half], *ranked[-half:]]
        return TrainingGroup(group_id, line["step"], len(ranked), tuple(shown))
    return None


def _trained_groups(credits: Sequence[RolloutCredit]) -> dict[str, list[RolloutCredit]]:
    groups: dict[str, list[RolloutCredit]] = {}
    for credit in credits:
        if credit.masked is None:
            groups.setdefault(credit.group_id, []).append(credit)
    return groups


def _division(rollouts: Sequence[Rollout]) -> float:
    rewards = [rollout.reward or 0.0 for rollout in rollouts]
    mean = sum(rewards) / len(rewards)
    return sum((reward - mean) ** 2 for reward in rewards) / len(rewards)


def _spread(pairs: Sequence[tuple[Rollout, Rollout]], count: int) -> list[tuple[Rollout, Rollout]]:
    """Evenly over the list: neighbours are often of the same kind."""
    if len(pairs) <= count:
        return list(pairs)
    return [pairs[index * len(pairs) // count] for index in range(count)]
