"""What a held-out evaluation says: success with an interval, by kind and by difficulty."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from upspiral.env.base import Task
from upspiral.eval.statistics import wilson_interval
from upspiral.types import Rollout


@dataclass(frozen=True, slots=True)
class Judged:
    """A task with the rollout that attempted it and the number of model calls it took."""

    task: Task
    rollout: Rollout
    calls: int

    @property
    def success(self) -> bool:
        return self.rollout.reward is not None and self.rollout.reward >= 1.0


def evaluation_line(judged: Sequence[Judged]) -> dict[str, Any]:
    """The metric line of one evaluation.

    A rollout without a reward (its infrastructure failed) is no verdict on the policy: it is left out of the rate and
    counted in `unjudged`. An agent that crashed, hung or ran out of calls did not succeed.
    """
    counted = [one for one in judged if one.rollout.reward is not None]
    successes = sum(one.success for one in counted)
    low, high = wilson_interval(successes, len(counted)) if counted else (0.0, 1.0)
    return {
        "tasks": len(counted),
        "unjudged": len(judged) - len(counted),
        "success": successes,
        "rate": successes / len(counted) if counted else 0.0,
        "low": low,
        "high": high,
        "mean_calls": sum(one.calls for one in counted) / max(len(counted), 1),
        "by_kind": _tally((one.task.kind, one.success) for one in counted),
        "by_difficulty": _tally((str(one.task.difficulty), one.success) for one in counted),
    }


def _tally(pairs: Iterable[tuple[str, bool]]) -> dict[str, list[int]]:
    """name -> [attempts, successes], by name."""
    table: dict[str, list[int]] = {}
    for name, success in pairs:
        row = table.setdefault(name, [0, 0])
        row[0] += 1
        row[1] += int(success)
    return dict(sorted(table.items()))
