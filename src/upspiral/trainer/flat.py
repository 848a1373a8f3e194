"""The slow twin of `forest.pack`: one row per root-to-leaf path, nothing shared. For tests and for doubt.

It shares no code with the packing: rows come straight from the graph. Loss and gradients equal those of the forest
(DESIGN law 2): a token with k leaves below it stands in k rows, with a k-th of its positive and of its negative credit
in each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from upspiral.trainer.forest import ForestBatch, Item
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import RolloutCredit


def flatten(items: Sequence[Item]) -> list[ForestBatch]:
    """One batch per leaf that has trained tokens on its path."""
    batches = []
    for graph, credit in items:
        if credit.masked is None:
            rows = (_row(graph, credit, leaf.id) for leaf in graph.leaves())
            batches += [row for row in rows if row.num_targets]
    return batches


def _row(graph: TrajectoryGraph, credit: RolloutCredit, leaf: int) -> ForestBatch:
    credit_of = {node.node_id: node for node in credit.nodes}
    targets, positive, negative, behavior, start = [], [], [], [], 0
    for node in graph.path(leaf):
        own = credit_of.get(node.id)
        if own is not None:
            leaves = _leaves_below(graph, node.id)
            trained = np.flatnonzero(node.sampled)
            targets += (start + trained).tolist()
            positive += [own.positive / leaves] * len(trained)
            negative += [own.negative / leaves] * len(trained)
            behavior += node.logprobs[trained].tolist()
        start += len(node.token_ids)
    token_ids, sources = graph.path_ids(leaf).astype(np.int64), np.array(targets, np.int64) - 1
    return ForestBatch(
        token_ids_T=token_ids,
        positions_T=np.arange(len(token_ids)),
        node_start_N=np.array([0]),
        node_length_N=np.array([len(token_ids)]),
        node_parent_N=np.array([-1]),
        sources_M=sources,
        targets_M=token_ids[sources + 1],
        positive_M=np.array(positive, np.float64),
        negative_M=np.array(negative, np.float64),
        token_weight_M=np.full(len(targets), credit.token_weight),
        behavior_logprobs_M=np.array(behavior, np.float64),
        rollout_M=np.zeros(len(targets), np.int64),
        rollout_ids=(graph.rollout_id,),
    )


def _leaves_below(graph: TrajectoryGraph, node_id: int) -> int:
    return max(1, sum(_leaves_below(graph, child.id) for child in graph.children(node_id)))
