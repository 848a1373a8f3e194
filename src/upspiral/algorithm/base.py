"""What every algorithm takes: a rollout with the tokens it made."""

from __future__ import annotations

from dataclasses import dataclass

from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import Rollout


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout that has ended. Its reward is None when infrastructure failed before a verifier could judge it."""

    rollout: Rollout
    graph: TrajectoryGraph
