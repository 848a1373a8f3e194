"""The forest batch: many rollouts packed so that every token is computed once, however many branches share it.

Legend: T tokens of the microbatch, N nodes of its forest, M trained tokens. Everything is numpy: the batch is the
input of every trainer backend and knows none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upspiral.trainer.trie import Branch, Trie
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import RolloutCredit

Item = tuple[TrajectoryGraph, RolloutCredit]


@dataclass(frozen=True, slots=True, eq=False)
class ForestBatch:
    """One forward and backward pass. A token attends to the earlier tokens of its node and to all of the node's
    ancestors, and to nothing else."""

    token_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    """Depth in the path, from 0."""
    node_start_N: NDArray[np.int64]
    """Nodes stand in depth-first preorder, their tokens side by side: a node's descendants follow it directly."""
    node_length_N: NDArray[np.int64]
    node_parent_N: NDArray[np.int64]
    """-1 for a root."""
    sources_M: NDArray[np.int64]
    """Index in T of the token whose hidden state predicts the target."""
    targets_M: NDArray[np.int64]
    positive_M: NDArray[np.float64]
    negative_M: NDArray[np.float64]
    token_weight_M: NDArray[np.float64]
    behavior_logprobs_M: NDArray[np.float64]
    rollout_M: NDArray[np.int64]
    """Index into `rollout_ids`."""
    rollout_ids: tuple[str, ...]
    minibatch: int = 0
    """Batches of equal number share an optimizer step."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def num_targets(self) -> int:
        return len(self.targets_M)


def pack(
    items: Sequence[Item], *, tokens_per_microbatch: int, minibatches: int = 1, lanes: int = 1
) -> list[ForestBatch]:
    """Packs the rollouts of a step into microbatches of at most `tokens_per_microbatch` unique tokens.

    What the rollouts share before they sampled anything stands once in a microbatch; masked rollouts and branches
    without trained tokens do not enter. A tree larger than the budget is split at its branches and the path down to
    them repeated; each trained token is a target exactly once. A single path longer than the budget gets a microbatch
    of its own. With `minibatches` > 1, groups are dealt into that many optimizer steps and token weights scaled up by
    (groups of the batch / groups of the minibatch), so that each is a mean over its own groups.

    With `lanes` > 1 that many microbatches are computed side by side, and one that is left alone has all cores. They are
    made a multiple of it in number and about equal in size, unless what has to be repeated for that costs more time.

    How items are ordered, packed and split changes gradients only by rounding (DESIGN law 3).
    """
    trained = [item for item in items if item[1].masked is None and item[1].nodes]
    batches: list[ForestBatch] = []
    for number, part in enumerate(_minibatches(trained, minibatches)):
        groups = len({credit.group_id for _, credit in part})
        scale = len({credit.group_id for _, credit in trained}) / groups
        trie = Trie()
        for index, (graph, credit) in enumerate(part):
            trie.insert(graph, credit.nodes, credit.token_weight * scale, index)
        trie.trim()
        rollout_ids = tuple(graph.rollout_id for graph, _ in part)
        branches = list(trie.preorder())
        batches += _batches(branches, _even_parts(branches, tokens_per_microbatch, lanes), rollout_ids, number)
    return batches


def _minibatches(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Groups dealt out in order of appearance, as evenly as they go; fewer parts when there are fewer groups."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item[1].group_id, []).append(item)
    dealt = [list(groups.values())[start::count] for start in range(count)]
    return [[item for group in part for item in group] for part in dealt if part]


def _even_parts(branches: list[Branch], budget: int, lanes: int) -> list[list[int]]:
    """The cheapest cut within the budget; for several lanes, if it is sooner done, the one with the smallest parts that
    has no more of them than the cheapest, rounded up to a multiple of `lanes`."""
    parts = _parts(branches, budget)
    wanted = -(-len(parts) // lanes) * lanes
    size = sum(len(branch) for branch in branches) / max(wanted, 1)
    while lanes > 1 and size < budget:
        finer = _parts(branches, int(size))
        if len(finer) <= wanted:
            return min(parts, finer, key=lambda cut: _duration(branches, cut, lanes))
        size *= 1.03
    return parts


def _duration(branches: list[Branch], parts: list[list[int]], lanes: int) -> float:
    """In the time that one core takes for a token. A part that runs alone has all cores and gains from them what it is
    large enough for (measured on two cores: 1.3 times one core's speed with 63 tokens, 1.5 with 255, 1.8 with 1,520)."""
    sizes = [sum(len(branches[index]) for index in part) for part in parts]
    duration = 0.0
    for first in range(0, len(sizes), lanes):
        at_once = sizes[first : first + lanes]
        gain = 1.0 if len(at_once) > 1 else 1 + (lanes - 1) * 0.85 * at_once[0] / (at_once[0] + 170)
        duration += max(at_once) / gain
    return duration


def _parts(branches: list[Branch], budget: int) -> list[list[int]]:
    """The cheaper of two ways to cut: branches together while they fit, or wherever the budget ends."""
    cuts = [_cut(branches, budget, keep_together=keep) for keep in (True, False)]
    return min(cuts, key=lambda cut: (sum(len(branches[i]) for part in cut for i in part), len(cut)))


def _batches(
    branches: list[Branch], parts: list[list[int]], rollout_ids: tuple[str, ...], minibatch: int
) -> list[ForestBatch]:
    batches, used = [], set[int]()
    for part in parts:
        batches.append(_Writer(branches, part, used).write(rollout_ids, minibatch))
        used.update(part)
    return batches


def _cut(branches: list[Branch], budget: int, *, keep_together: bool) -> list[list[int]]:
    """Parts of the preorder list, each closed under ancestors and within the budget if its longest path is."""
    index_of = {id(branch): index for index, branch in enumerate(branches)}
    parents = [index_of.get(id(branch.parent), -1) for branch in branches]
    ends, sizes = _subtrees(branches, parents)
    parts, current, used = [], dict[int, None](), 0
    index = 0
    while index < len(branches):
        path = _path(parents, index)
        whole = sizes[index] - len(branches[index])
        missing = sum(len(branches[above]) for above in path if above not in current)
        fresh = sum(len(branches[above]) for above in path)
        is_leaf = ends[index] == index + 1
        fits = used + missing + whole <= budget
        if not fits and not is_leaf and not (keep_together and current and fresh + whole <= budget):
            index += 1  # too large to enter whole: its children are placed one by one
            continue
        if not fits and current:
            parts.append(sorted(current))
            current, used, missing = {}, 0, fresh
        current |= dict.fromkeys(path) | dict.fromkeys(range(index, ends[index]))
        used += missing + whole
        index = ends[index]
    return [*parts, sorted(current)] if current else parts


def _subtrees(branches: list[Branch], parents: list[int]) -> tuple[list[int], list[int]]:
    """For each branch: where its subtree ends in the preorder, and how many tokens the subtree has."""
    ends, sizes = list(range(1, len(branches) + 1)), [len(branch) for branch in branches]
    for index in range(len(branches) - 1, -1, -1):
        if parents[index] >= 0:
            ends[parents[index]] = max(ends[parents[index]], ends[index])
            sizes[parents[index]] += sizes[index]
    return ends, sizes


def _path(parents: list[int], index: int) -> list[int]:
    path = []
    while index >= 0:
        path.append(index)
        index = parents[index]
    return path


class _Writer:
    """Lays out one part of the trie as arrays. A branch with one child in the part is joined with it to one node."""

    def __init__(self, branches: list[Branch], part: Sequence[int], done: set[int]) -> None:
        """`done`: branches whose targets an earlier part has taken; they enter as context only."""
        self._branches = [branches[index] for index in part]
        self._targets = {id(branches[index]): [] if index in done else branches[index].targets for index in part}
        self._node_of: dict[int, int] = {}
        self._end_of: dict[int, int] = {}
        self._nodes: list[list[int]] = []

    def write(self, rollout_ids: tuple[str, ...], minibatch: int) -> ForestBatch:
        positions, sources, runs, at = [], [], [], 0
        for branch in self._branches:
            depth = self._place(branch, at)
            positions.append(np.arange(depth, depth + len(branch)))
            for run in self._targets[id(branch)]:
                sources.append(np.arange(at + run.offset, at + run.offset + len(run)))
                runs.append(run)
            at += len(branch)
        starts, lengths, parents = (np.array(column, np.int64) for column in zip(*self._nodes, strict=True))

        def per_token(values: list[float]) -> NDArray[np.float64]:
            return np.repeat(np.array(values, np.float64), [len(run) for run in runs])

        return ForestBatch(
            token_ids_T=np.concatenate([branch.token_ids for branch in self._branches]).astype(np.int64),
            positions_T=np.concatenate(positions).astype(np.int64),
            node_start_N=starts,
            node_length_N=lengths,
            node_parent_N=parents,
            sources_M=np.concatenate(sources).astype(np.int64),
            targets_M=np.concatenate([run.token_ids for run in runs]).astype(np.int64),
            positive_M=per_token([run.positive for run in runs]),
            negative_M=per_token([run.negative for run in runs]),
            token_weight_M=per_token([run.token_weight for run in runs]),
            behavior_logprobs_M=np.concatenate([run.logprobs for run in runs]).astype(np.float64),
            rollout_M=np.repeat(np.array([run.rollout for run in runs], np.int64), [len(run) for run in runs]),
            rollout_ids=rollout_ids,
            minibatch=minibatch,
        )

    def _place(self, branch: Branch, at: int) -> int:
        """Gives the branch, whose first token stands at `at`, to a node. Returns the depth of that token."""
        parent = id(branch.parent)
        depth = self._end_of.get(parent, 0)
        self._end_of[id(branch)] = depth + len(branch)
        if parent in self._node_of and self._is_only_child(branch):
            self._node_of[id(branch)] = self._node_of[parent]
            self._nodes[self._node_of[parent]][1] += len(branch)
        else:
            self._node_of[id(branch)] = len(self._nodes)
            self._nodes.append([at, len(branch), self._node_of.get(parent, -1)])
        return depth

    def _is_only_child(self, branch: Branch) -> bool:
        assert branch.parent is not None
        return sum(id(sibling) in self._targets for sibling in branch.parent.children) == 1
