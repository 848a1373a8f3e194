"""A radix trie over the tokens of many rollouts: what they share stands in it once.

Unsampled runs are merged token by token, across rollouts and groups, where they took the same routes through experts.
Sampled runs are never merged, even when two rollouts happened to sample the same tokens: each keeps its own credit,
log-probabilities and descendants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import UNKNOWN_EXPERT, Node, NodeCredit


@dataclass(frozen=True, slots=True, eq=False)
class TargetRun:
    """Consecutive sampled tokens and the credit they share. The token before the first of them predicts the first."""

    offset: int
    """Where in its branch the token stands that predicts the first target; the next predicts the second, and so on."""
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    positive: float
    negative: float
    token_weight: float
    rollout: int
    """Index of the rollout in the batch."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def shifted(self, by: int) -> TargetRun:
        return replace(self, offset=self.offset + by)

    def part(self, start: int, end: int) -> TargetRun:
        return replace(self, token_ids=self.token_ids[start:end], logprobs=self.logprobs[start:end])


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """A run of tokens with the experts that each goes to."""

    token_ids: NDArray[np.int32]
    routes: NDArray[np.int16]
    """[T, L, K]; no layers where no routes are replayed."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def part(self, start: int, end: int | None = None) -> Steps:
        return Steps(self.token_ids[start:end], self.routes[start:end])

    @property
    def first(self) -> bytes:
        """Equal for steps that begin with the same token on the same routes."""
        return self.token_ids[:1].tobytes() + self.routes[:1].tobytes()

    def common(self, other: Steps) -> int:
        """How many steps from the first on are the same."""
        length = min(len(self), len(other))
        differs = self.token_ids[:length] != other.token_ids[:length]
        differs |= (self.routes[:length] != other.routes[:length]).any(axis=(1, 2))
        return int(differs.argmax()) if differs.any() else length


@dataclass(slots=True, eq=False)
class Branch:
    """A run of tokens that nothing divides, and what hangs below its last token."""

    steps: Steps
    parent: Branch | None = None
    children: list[Branch] = field(default_factory=list)
    shared: dict[bytes, Branch] = field(default_factory=dict)
    """The children that start with an unsampled token, by that token and its routes."""
    targets: list[TargetRun] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)


class Trie:
    """Insert rollouts, then `trim`, then read `preorder`. The root is empty and stands for no token."""

    def __init__(self, route_shape: tuple[int, int] = (0, 0)) -> None:
        """`route_shape`: [L, K], how many layers have experts and how many a token goes to; (0, 0): no routes."""
        self.root = Branch(Steps(np.empty(0, np.int32), np.empty((0, *route_shape), np.int16)))
        self._route_shape = route_shape

    def insert(self, graph: TrajectoryGraph, credits: Sequence[NodeCredit], weight: float, rollout: int) -> None:
        """Adds all tokens of a rollout; those of credited nodes become targets with `weight`."""
        credit_of = {credit.node_id: credit for credit in credits}
        ends: dict[int | None, Branch] = {None: self.root}
        for node in graph.nodes:
            cursor = ends[node.parent]
            credit = credit_of.get(node.id)
            steps = self._steps(graph, node)
            for start, end in _runs(node.sampled):
                part = steps.part(start, end)
                if not node.sampled[start]:
                    cursor = _descend(cursor, part)
                elif credit is None:
                    cursor = _grow(cursor, part)
                else:
                    cursor = _grow_trained(cursor, part, _target_run(node, (start, end), credit, weight, rollout))
            ends[node.id] = cursor

    def _steps(self, graph: TrajectoryGraph, node: Node) -> Steps:
        routes = graph.routes(node.id) if self._route_shape[0] else None
        if routes is None:
            routes = np.full((len(node.token_ids), *self._route_shape), UNKNOWN_EXPERT, np.int16)
        return Steps(node.token_ids, routes)

    def trim(self) -> None:
        """Cuts what no target needs: branches without targets below, and tokens after the last that predicts one."""
        for branch in [*reversed(list(self.preorder())), self.root]:
            branch.children = [child for child in branch.children if len(child)]
            if not branch.children:
                needed = max((run.offset + len(run) for run in branch.targets), default=0)
                branch.steps = branch.steps.part(0, needed)

    def divide(self, most: int) -> None:
        """Cuts branches so that none has more than `most` tokens."""
        for branch in list(self.preorder()):
            while len(branch) > most:
                _split(branch, most)

    def preorder(self) -> Iterator[Branch]:
        """Every branch but the root, parents first."""
        stack = self.root.children[::-1]
        while stack:
            branch = stack.pop()
            yield branch
            stack.extend(reversed(branch.children))


def _runs(sampled: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """The stretches of equal value: (start, end)."""
    edges = [0, *(np.flatnonzero(np.diff(sampled)) + 1).tolist(), len(sampled)]
    return pairwise(edges)


def _descend(cursor: Branch, steps: Steps) -> Branch:
    """Follows unsampled tokens down from the end of `cursor`, splitting and adding branches as needed. Returns the
    branch that ends with the last of them."""
    while len(steps):
        child = cursor.shared.get(steps.first)
        if child is None:
            child = _grow(cursor, steps)
            cursor.shared[steps.first] = child
            return child
        common = child.steps.common(steps)
        cursor = child if common == len(child) else _split(child, common)
        steps = steps.part(common)
    return cursor


def _split(branch: Branch, at: int) -> Branch:
    """Puts a new branch with the first `at` tokens above `branch`, which keeps the rest and thereby its end: cursors
    that stand at the end of a branch stay right. Returns the new one."""
    parent, first, rest = branch.parent, branch.steps.first, branch.steps.part(at)
    assert parent is not None
    upper = Branch(branch.steps.part(0, at), parent, [branch])
    if parent.shared.get(first) is branch:
        parent.shared[first] = upper
        upper.shared = {rest.first: branch}
    upper.targets = [run.part(0, at - run.offset) for run in branch.targets if run.offset < at]
    branch.targets = [
        run.part(max(0, at - run.offset), len(run)).shifted(max(0, at - run.offset) - at)
        for run in branch.targets
        if run.offset + len(run) > at
    ]
    branch.steps, branch.parent = rest, upper
    parent.children[parent.children.index(branch)] = upper
    return upper


def _grow(cursor: Branch, steps: Steps) -> Branch:
    child = Branch(steps, cursor)
    cursor.children.append(child)
    return child


def _grow_trained(cursor: Branch, steps: Steps, run: TargetRun) -> Branch:
    """A private branch of sampled tokens. The first is predicted by the last token of `cursor`."""
    child = _grow(cursor, steps)
    cursor.targets.append(run.part(0, 1).shifted(len(cursor) - 1))
    if len(run) > 1:
        child.targets.append(run.part(1, len(run)))
    return child


def _target_run(node: Node, span: tuple[int, int], credit: NodeCredit, weight: float, rollout: int) -> TargetRun:
    start, end = span
    return TargetRun(
        0, node.token_ids[start:end], node.logprobs[start:end], credit.positive, credit.negative, weight, rollout
    )
