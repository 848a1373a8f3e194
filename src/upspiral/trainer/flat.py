"""The slow twin of `forest.pack`: rows that share nothing. For tests, for benchmarks and for doubt.

It shares no code with the packing: rows come straight from the graph. Loss and gradients equal those of the forest
(DESIGN law 2), whether there is a row for each root-to-leaf path (a token with k leaves below it stands in k rows, with
a k-th of its positive and of its negative credit in each) or for each call of the model, with what the call sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upspiral.trainer.forest import ForestBatch, Item, route_shape
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import UNKNOWN_EXPERT


def flatten(items: Sequence[Item]) -> list[ForestBatch]:
    """One batch per leaf that has trained tokens on its path."""
    batches, shape = [], route_shape(items)
    for graph, credit in items:
        if credit.masked is None:
            rows = (_row((graph, credit), leaf.id, shape) for leaf in graph.leaves())
            batches += [row for row in rows if row.num_targets]
    return batches


def call_rows(items: Sequence[Item]) -> list[ForestBatch]:
    """One batch per call: the whole history as it was sent, and as targets the tokens that this call sampled. What
    trainers do that know requests and no graph."""
    shape = route_shape(items)
    return [
        _row((graph, replace(credit, nodes=(node,))), node.node_id, shape, leaves=1)
        for graph, credit in items
        if credit.masked is None
        for node in credit.nodes
    ]


def side_by_side(rows: Sequence[ForestBatch], tokens_per_microbatch: int, lanes: int = 1) -> list[ForestBatch]:
    """Rows joined to batches of at most so many tokens, without padding: each row is a tree of its own."""
    parts: list[list[ForestBatch]] = []
    room = 0
    for row in rows:
        if row.num_tokens > room:
            parts.append([])
            room = tokens_per_microbatch
        parts[-1].append(row)
        room -= row.num_tokens
    return [replace(_joined(part), lane=number % lanes) for number, part in enumerate(parts)]


def _joined(rows: Sequence[ForestBatch]) -> ForestBatch:
    starts = np.cumsum([0, *(row.num_tokens for row in rows[:-1])])
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(row, name) for row in rows])
        for name in ForestBatch.__slots__
        if name.endswith(("_T", "_TLK", "_M"))
    }
    columns["sources_M"] = np.concatenate([row.sources_M + start for row, start in zip(rows, starts, strict=True)])
    columns["rollout_M"] = np.repeat(np.arange(len(rows)), [row.num_targets for row in rows])
    return ForestBatch(
        **columns,
        node_start_N=starts,
        node_length_N=np.array([row.num_tokens for row in rows]),
        node_parent_N=np.full(len(rows), -1),
        rollout_ids=tuple(row.rollout_ids[0] for row in rows),
    )


def _row(item: Item, leaf: int, shape: tuple[int, int], leaves: int = 0) -> ForestBatch:
    """The path to `leaf`, with routes of `shape`. Credit is divided by `leaves`; 0: by those that the graph has below
    each node."""
    graph, credit = item
    credit_of = {node.node_id: node for node in credit.nodes}
    targets, positive, negative, behavior, start = [], [], [], [], 0
    for node in graph.path(leaf):
        own = credit_of.get(node.id)
        if own is not None:
            shares = leaves or _leaves_below(graph, node.id)
            trained = np.flatnonzero(node.sampled)
            targets += (start + trained).tolist()
            positive += [own.positive / shares] * len(trained)
            negative += [own.negative / shares] * len(trained)
            behavior += node.logprobs[trained].tolist()
        start += len(node.token_ids)
    token_ids, sources = graph.path_ids(leaf).astype(np.int64), np.array(targets, np.int64) - 1
    return ForestBatch(
        token_ids_T=token_ids,
        positions_T=np.arange(len(token_ids)),
        routes_TLK=np.concatenate([_routes(graph, node.id, shape) for node in graph.path(leaf)]),
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


def _routes(graph: TrajectoryGraph, node_id: int, shape: tuple[int, int]) -> NDArray[np.int16]:
    routes = graph.routes(node_id)
    length = len(graph.nodes[node_id].token_ids)
    return np.full((length, *shape), UNKNOWN_EXPERT, np.int16) if routes is None else routes


def _leaves_below(graph: TrajectoryGraph, node_id: int) -> int:
    return max(1, sum(_leaves_below(graph, child.id) for child in graph.children(node_id)))
