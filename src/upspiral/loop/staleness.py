"""Whether a batch is of the policy that it is to change, judged by the versions on its tokens."""

from __future__ import annotations

from collections.abc import Iterable

from upspiral.errors import RunError
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import RolloutStatus


def check_versions(graphs: Iterable[TrajectoryGraph], policy: int, store: TrajectoryStore) -> None:
    """Raises RunError when tokens were sampled by another version than `policy`. Steps are synchronous, so only an
    engine without the newest weights gives some. Their rollouts are cancelled in the store, so that a resumed run tries
    them again."""
    stale = {graph.rollout_id: others for graph in graphs if (others := _others(graph, policy))}
    if not stale:
        return
    for rollout_id in stale:
        store.finish_rollout(rollout_id, status=RolloutStatus.CANCELLED, reason="stale")
    rollout_id, others = next(iter(stale.items()))
    raise RunError(
        f"{len(stale)} rollouts have tokens of other versions than {policy}, which the step is to train ({rollout_id}: "
        f"{others}); an engine had not the newest weights: see its log, and go on with --resume, which gives all "
        "engines those of the checkpoint"
    )


def _others(graph: TrajectoryGraph, policy: int) -> list[int]:
    return sorted({int(version) for node in graph.nodes for version in node.versions[node.sampled]} - {policy})
