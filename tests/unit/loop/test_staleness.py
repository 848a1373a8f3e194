"""A step trains on its own policy's tokens alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from upspiral.errors import RunError
from upspiral.loop.staleness import check_versions
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Rollout, RolloutStatus


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    store = TrajectoryStore(tmp_path / "trajectories.db")
    for name in ("one", "two"):
        store.create_rollout(Rollout(name, "a task", "step-0005-000", split="train", step=5))
        store.finish_rollout(name, status=RolloutStatus.FINISHED, reward=1.0)
    return store


def rollout(name: str, *versions: int) -> TrajectoryGraph:
    graph = TrajectoryGraph(name)
    root = graph.add(None, TokenRun.given([1, 2]), role="user", reason="append")
    answer = TokenRun.answer([], [3] * len(versions), [-1.0] * len(versions), versions, "stop")
    graph.add(root.id, answer, role="assistant", reason="append")
    return graph


def test_tokens_of_the_policy_pass(store: TrajectoryStore) -> None:
    check_versions([rollout("one", 4, 4), rollout("two", 4)], 4, store)
    assert store.rollout("one").reward == store.rollout("two").reward == 1.0


@pytest.mark.parametrize("other", [3, 5])
def test_others_are_an_error_and_their_rollouts_are_tried_again(other: int, store: TrajectoryStore) -> None:
    with pytest.raises(RunError, match=rf"1 rollouts have tokens of other versions than 4.*two: \[{other}\]"):
        check_versions([rollout("one", 4, 4), rollout("two", 4, other, 4)], 4, store)
    assert store.rollout("one").status is RolloutStatus.FINISHED
    assert store.rollout("two").status is RolloutStatus.CANCELLED
