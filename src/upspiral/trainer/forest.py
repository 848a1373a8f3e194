"""The forest batch: many rollouts packed so that every token is computed once, however many branches share it.

Legend: T tokens of the microbatch, N nodes of its forest, M trained tokens, L layers with experts, K experts of a
token. Everything is numpy: the batch is the input of every trainer backend and knows none of them.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from upspiral.trainer.trie import Branch, Trie
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import RolloutCredit

Item = tuple[TrajectoryGraph, RolloutCredit]

_PASS_COSTS = 70
"""Tokens in the time that a pass takes beside its tokens: weights are read and gradients written (the same model)."""
_DEPTH_THAT_DOUBLES = 1500
"""At this depth a token's attention costs as much as its linear layers (measured: 135M parameters, bfloat16, CPU)."""


@dataclass(frozen=True, slots=True)
class ContextRun:
    """Tokens [start, end) of an earlier batch."""

    batch: int
    """Counted among the batches of the same minibatch and lane."""
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, eq=False)
class ForestBatch:
    """One forward and backward pass. A token attends to the earlier tokens of its node, to all of the node's ancestors,
    and to nothing else. Ancestors that an earlier batch computed are its `context`."""

    token_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    """Depth in the path, from 0."""
    routes_TLK: NDArray[np.int16]
    """The experts that each token goes to, UNKNOWN_EXPERT where the model decides; no layers: it decides everywhere."""
    node_start_N: NDArray[np.int64]
    """Nodes stand in depth-first preorder, their tokens side by side: a node's descendants follow it directly."""
    node_length_N: NDArray[np.int64]
    node_parent_N: NDArray[np.int64]
    """-1 for a root, and for a node whose parent is in the context: it and its descendants see as many tokens of the
    context as its first token is deep."""
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
    lane: int = 0
    """Batches of equal number are computed one after the other, in their order; those of others may be at the same
    time."""
    context: tuple[ContextRun, ...] = ()
    """One path from its root down."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_T)

    @property
    def num_targets(self) -> int:
        return len(self.targets_M)

    @property
    def context_length(self) -> int:
        return sum(len(run) for run in self.context)

    @property
    def subtree_end_N(self) -> NDArray[np.int64]:
        """Of each node, the place behind the last token of it and its descendants."""
        ends = self.node_start_N + self.node_length_N
        for node in range(len(ends) - 1, -1, -1):
            parent = self.node_parent_N[node]
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[node])
        return ends


def pack(
    items: Sequence[Item], *, tokens_per_microbatch: int, minibatches: int = 1, lanes: int = 1, apart: bool = False
) -> list[ForestBatch]:
    """Packs the rollouts of a step into microbatches of at most `tokens_per_microbatch` unique tokens.

    What the rollouts share before they sampled anything stands once in a lane; masked rollouts and branches without
    trained tokens do not enter. A tree larger than the budget is split depth first, and what hangs below an earlier
    part has the path to it as context: no prefix is computed twice. With `minibatches` > 1, groups are dealt into that
    many optimizer steps and token weights scaled up by (groups of the batch / groups of the minibatch), so that each is
    a mean over its own groups.

    With `lanes` > 1 the trees are dealt to that many lanes, about equal in cost. A tree that is cut for it has the path
    down to the cut in both; where that costs more than it gains, there is one lane, which has all cores. `apart`: lanes
    are on machines or devices of their own, so that one alone is no faster, and they are dealt wherever it helps.

    How items are ordered, packed and split changes gradients only by rounding (DESIGN law 3).
    """
    trained = [item for item in items if item[1].masked is None and item[1].nodes]
    batches: list[ForestBatch] = []
    for number, part in enumerate(_minibatches(trained, minibatches)):
        groups = len({credit.group_id for _, credit in part})
        scale = len({credit.group_id for _, credit in trained}) / groups
        trie = Trie(route_shape(part))
        for index, (graph, credit) in enumerate(part):
            trie.insert(graph, credit.nodes, credit.token_weight * scale, index)
        trie.trim()
        trie.divide(tokens_per_microbatch)
        rollout_ids = tuple(graph.rollout_id for graph, _ in part)
        done = set[int]()
        for lane, branches in enumerate(_deal(list(trie.preorder()), lanes, apart)):
            for batch in _Layout(branches, done).batches(tokens_per_microbatch):
                batches.append(replace(batch, rollout_ids=rollout_ids, minibatch=number, lane=lane))
            done |= {id(branch) for branch in branches}
    return batches


def plain_path(token_ids: Sequence[int]) -> ForestBatch:
    """One path whose tokens but the first are targets without credit: to compute their log-probabilities."""
    ids, count = np.array(token_ids, np.int64), len(token_ids)
    nothing = np.zeros(count - 1)
    return ForestBatch(
        token_ids_T=ids, positions_T=np.arange(count), routes_TLK=np.empty((count, 0, 0), np.int16),
        node_start_N=np.array([0]), node_length_N=np.array([count]), node_parent_N=np.array([-1]),
        sources_M=np.arange(count - 1), targets_M=ids[1:],
        positive_M=nothing, negative_M=nothing, token_weight_M=nothing, behavior_logprobs_M=nothing,
        rollout_M=np.zeros(count - 1, np.int64), rollout_ids=("",),
    )  # fmt: skip


def route_shape(items: Sequence[Item]) -> tuple[int, int]:
    """How many layers have experts and how many a token goes to; (0, 0) where no rollout has routes."""
    kept = (node.routes for graph, _ in items for node in graph.nodes if node.routes is not None)
    first = next(kept, None)
    return (0, 0) if first is None else (first.shape[1], first.shape[2])


def _minibatches(items: Sequence[Item], count: int) -> list[list[Item]]:
    """Groups dealt out in order of appearance, as evenly as they go; fewer parts when there are fewer groups."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item[1].group_id, []).append(item)
    dealt = [list(groups.values())[start::count] for start in range(count)]
    return [[item for group in part for item in group] for part in dealt if part]


def _deal(branches: list[Branch], lanes: int, apart: bool) -> list[list[Branch]]:
    """At most `lanes` lists, each closed under ancestors and in preorder; one where dealing gains nothing."""
    costs = _costs(branches)
    whole, size = [branches], sum(costs.values()) / lanes
    while lanes > 1 and size < sum(costs.values()):
        dealt = _cut(branches, costs, size, lanes)
        if dealt is not None:
            return min(whole, dealt, key=lambda parts: _duration(parts, costs, 1 if apart else lanes))
        size *= 1.02
    return whole if branches else []


def _costs(branches: list[Branch]) -> dict[int, float]:
    """Of each branch, by its id: in tokens of a short context."""
    ends, costs = dict[int, int](), dict[int, float]()
    for branch in branches:
        depth = ends.get(id(branch.parent), 0)
        ends[id(branch)] = depth + len(branch)
        costs[id(branch)] = len(branch) * (1 + (depth + len(branch) / 2) / _DEPTH_THAT_DOUBLES)
    return costs


def _duration(parts: list[list[Branch]], costs: dict[int, float], cores: int) -> float:
    """In the time that one core takes for a token. A lane that runs alone has all cores and gains from them what it is
    large enough for (measured with two cores: 1.3 times one core's speed for 63 tokens, 1.5 for 255, 1.8 for 1,520)."""
    longest = max((sum(costs[id(branch)] for branch in part) for part in parts), default=0.0)
    if len(parts) > 1:
        return longest + _PASS_COSTS
    return longest / (1 + (cores - 1) * 0.85 * longest / (longest + 170)) + _PASS_COSTS / cores


def _cut(branches: list[Branch], costs: dict[int, float], size: float, most: int) -> list[list[Branch]] | None:
    """The preorder in parts of at most `size` in cost, the path down to a part included; None: in more than `most`."""
    parts: list[dict[int, Branch]] = [{}]
    used = 0.0
    for branch in branches:
        missing = _path(branch, parts[-1])
        if parts[-1] and used + sum(costs[id(each)] for each in missing) > size:
            if len(parts) == most:
                return None
            parts.append({})
            missing, used = _path(branch), 0.0
        parts[-1].update((id(each), each) for each in missing)
        used += sum(costs[id(each)] for each in missing)
    return [list(part.values()) for part in parts]


def _path(branch: Branch, below: Container[int] = ()) -> list[Branch]:
    """From below the trie's root, or below the last branch whose id is given, down to the branch."""
    path = []
    while branch.parent is not None and id(branch) not in below:
        path.append(branch)
        branch = branch.parent
    return path[::-1]


class _Layout:
    """Lays out the branches of one lane as batches."""

    def __init__(self, branches: list[Branch], done: set[int]) -> None:
        """`done`: branches whose targets another lane has taken; they enter for those below them only."""
        self._branches = branches
        self._done = done
        self._at: dict[int, tuple[int, int]] = {}
        """Batch and place of each branch written so far."""
        self._ends: dict[int, int] = {}
        """Depth at which each branch ends."""

    def batches(self, budget: int) -> list[ForestBatch]:
        """At most `budget` tokens each, if no branch is longer. Branches with more than that below them stand apart
        from the subtrees that fit, so that what is kept for later batches is a path and nothing beside it."""
        written: list[ForestBatch] = []
        sizes = self._subtrees()
        part, used, on_path = list[Branch](), 0, False
        for branch in self._branches:
            is_path = sizes[id(branch)] > budget
            begins = is_path or sizes.get(id(branch.parent), budget + 1) > budget
            comes = len(branch) if is_path else sizes[id(branch)]
            if part and (is_path != on_path or (begins and used + comes > budget)):
                written.append(self._batch(part, len(written)))
                part, used = [], 0
            part.append(branch)
            used += comes if begins else 0
            on_path = is_path
        return [*written, self._batch(part, len(written))] if part else written

    def _subtrees(self) -> dict[int, int]:
        """Tokens of each branch and what hangs below it, by the branch's id."""
        sizes = {id(branch): len(branch) for branch in self._branches}
        for branch in reversed(self._branches):
            if id(branch.parent) in sizes:
                sizes[id(branch.parent)] += sizes[id(branch)]
        return sizes

    def _batch(self, part: list[Branch], number: int) -> ForestBatch:
        context = self._context(part[0])
        positions, sources, runs, nodes, at = [], [], [], _Nodes(part), 0
        for branch in part:
            depth = self._ends.get(id(branch.parent), 0)
            nodes.place(branch, at)
            self._at[id(branch)], self._ends[id(branch)] = (number, at), depth + len(branch)
            positions.append(np.arange(depth, depth + len(branch)))
            for run in () if id(branch) in self._done else branch.targets:
                sources.append(np.arange(at + run.offset, at + run.offset + len(run)))
                runs.append(run)
            at += len(branch)
        starts, lengths, parents = nodes.columns()
        none = np.empty(0)

        def per_token(values: list[float]) -> NDArray[np.float64]:
            return np.repeat(np.array(values, np.float64), [len(run) for run in runs])

        return ForestBatch(
            token_ids_T=np.concatenate([branch.steps.token_ids for branch in part]).astype(np.int64),
            positions_T=np.concatenate(positions).astype(np.int64),
            routes_TLK=np.concatenate([branch.steps.routes for branch in part]),
            node_start_N=starts,
            node_length_N=lengths,
            node_parent_N=parents,
            sources_M=np.concatenate([none, *sources]).astype(np.int64),
            targets_M=np.concatenate([none, *(run.token_ids for run in runs)]).astype(np.int64),
            positive_M=per_token([run.positive for run in runs]),
            negative_M=per_token([run.negative for run in runs]),
            token_weight_M=per_token([run.token_weight for run in runs]),
            behavior_logprobs_M=np.concatenate([none, *(run.logprobs for run in runs)]).astype(np.float64),
            rollout_M=np.repeat(np.array([run.rollout for run in runs], np.int64), [len(run) for run in runs]),
            rollout_ids=(),
            context=context,
        )

    def _context(self, first: Branch) -> tuple[ContextRun, ...]:
        """Where the path down to a batch's first branch stands. In preorder, all other branches of the batch hang below
        that path or below each other."""
        runs: list[ContextRun] = []
        for branch in _path(first)[:-1]:
            batch, at = self._at[id(branch)]
            if runs and (runs[-1].batch, runs[-1].end) == (batch, at):
                runs[-1] = ContextRun(batch, runs[-1].start, at + len(branch))
            else:
                runs.append(ContextRun(batch, at, at + len(branch)))
        return tuple(runs)


class _Nodes:
    """The node table of one batch. A branch with one child in the batch is joined with it to one node."""

    def __init__(self, part: list[Branch]) -> None:
        self._part = {id(branch) for branch in part}
        self._node_of: dict[int, int] = {}
        self._rows: list[list[int]] = []

    def place(self, branch: Branch, at: int) -> None:
        """Gives the branch, whose first token stands at `at`, to a node."""
        parent = self._node_of.get(id(branch.parent), -1)
        if parent >= 0 and self._is_only_child(branch):
            self._node_of[id(branch)] = parent
            self._rows[parent][1] += len(branch)
        else:
            self._node_of[id(branch)] = len(self._rows)
            self._rows.append([at, len(branch), parent])

    def columns(self) -> tuple[NDArray[np.int64], ...]:
        """Starts, lengths and parents."""
        return tuple(np.array(column, np.int64) for column in zip(*self._rows, strict=True))

    def _is_only_child(self, branch: Branch) -> bool:
        assert branch.parent is not None
        return sum(id(sibling) in self._part for sibling in branch.parent.children) == 1
