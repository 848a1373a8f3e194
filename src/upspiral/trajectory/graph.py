"""The trajectory graph: every token of one rollout, as a forest of immutable nodes.

Invariant: the tokens of a node's path, root first, are exactly what the engine saw before and while it sampled the
node. The graph compares tokens only; what a message means is for the gateway to decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upspiral.types import NOT_SAMPLED_VERSION, UNKNOWN_EXPERT, Edge, FinishReason, Message, Node, Role


@dataclass(frozen=True, slots=True, eq=False)
class TokenRun:
    """Tokens and where they come from. The arrays have equal length; see `Node` for their meaning."""

    token_ids: NDArray[np.int32]
    sampled: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    finish_reason: FinishReason | None = None
    routes: NDArray[np.int16] | None = None

    @classmethod
    def given(cls, token_ids: ArrayLike, routes: NDArray[np.int16] | None = None) -> TokenRun:
        """Tokens that no policy sampled: a rendered message."""
        ids = _frozen(token_ids, np.int32, "token_ids")
        return cls(
            ids,
            _frozen(np.zeros(len(ids), bool), np.bool_, "sampled"),
            _frozen(np.full(len(ids), np.nan), np.float32, "logprobs"),
            _frozen(np.full(len(ids), NOT_SAMPLED_VERSION), np.int32, "versions"),
            routes=routes,
        )

    @classmethod
    def answer(
        cls,
        prompt_ids: ArrayLike,
        sampled_ids: ArrayLike,
        logprobs: ArrayLike,
        versions: ArrayLike,
        finish_reason: FinishReason,
        routes: NDArray[np.int16] | None = None,
    ) -> TokenRun:
        """The generation prompt, not sampled, followed by what the engine sampled, stop token included."""
        prompt, answer = cls.given(prompt_ids), _frozen(sampled_ids, np.int32, "sampled_ids")
        return cls(
            _frozen(np.concatenate([prompt.token_ids, answer]), np.int32, "token_ids"),
            _frozen(np.concatenate([prompt.sampled, np.ones(len(answer), bool)]), np.bool_, "sampled"),
            _frozen(np.concatenate([prompt.logprobs, _array(logprobs, np.float32)]), np.float32, "logprobs"),
            _frozen(np.concatenate([prompt.versions, _array(versions, np.int32)]), np.int32, "versions"),
            finish_reason,
            routes,
        )


class NodeDetails(TypedDict, total=False):
    """What a node may have beside tokens and a place; see `Node` for meaning and defaults."""

    message: Message | None
    delivered: bool
    auxiliary: str


class TrajectoryGraph:
    """All nodes of one rollout. Append-only.

    `append` and `add` raise ValueError for a node that breaks the invariants: a caller's bug, never a user's.
    """

    def __init__(self, rollout_id: str) -> None:
        self.rollout_id = rollout_id
        self._nodes: list[Node] = []
        self._children: dict[int | None, list[int]] = {}
        self._edges: list[Edge] = []
        self._lengths: list[int] = []

    @property
    def nodes(self) -> Sequence[Node]:
        """In the order of commitment; `nodes[i].id == i`, and a parent stands before its children."""
        return self._nodes

    @property
    def next_id(self) -> int:
        return len(self._nodes)

    @property
    def num_sampled(self) -> int:
        return sum(node.num_sampled for node in self._nodes)

    def add(
        self,
        parent: int | None,
        tokens: TokenRun,
        *,
        role: Role,
        reason: str,
        **details: Unpack[NodeDetails],
    ) -> Node:
        """Makes the next node from a run of tokens and appends it. Returns the node."""
        node = Node(
            id=self.next_id,
            parent=parent,
            role=role,
            reason=reason,
            token_ids=tokens.token_ids,
            sampled=tokens.sampled,
            logprobs=tokens.logprobs,
            versions=tokens.versions,
            routes=tokens.routes,
            finish_reason=tokens.finish_reason,
            **details,
        )
        self.append(node)
        return node

    def append(self, node: Node) -> None:
        """Appends a node whose id is `next_id`."""
        self._check_place(node)
        _check_tokens(node)
        if node.parent is None and bool(node.sampled[0]):
            raise ValueError(f"{self._name(node)}: the first token of a root cannot be sampled; nothing predicts it")
        before = 0 if node.parent is None else self._lengths[node.parent]
        self._lengths.append(before + len(node.token_ids))
        self._nodes.append(node)
        self._children.setdefault(node.parent, []).append(node.id)

    @property
    def edges(self) -> Sequence[Edge]:
        """Causal edges between nodes, in the order in which they were found."""
        return self._edges

    def connect(self, edge: Edge) -> None:
        """Adds a causal edge between two nodes of the graph; one that is there already is not added again."""
        if not (0 <= edge.source < self.next_id and 0 <= edge.target < self.next_id) or edge.source == edge.target:
            raise ValueError(f"rollout {self.rollout_id!r}: no edge can join nodes {edge.source} and {edge.target}")
        if edge not in self._edges:
            self._edges.append(edge)

    def withheld(self, node: Node) -> str | None:
        """Why the node's sampled tokens must stay out of the loss whatever the rollout is worth; None: they need not.

        "auxiliary": a side call. "undelivered": nobody received the answer and nothing continues it, so it cannot have
        earned the reward.
        """
        if node.num_sampled == 0:
            return None
        if node.auxiliary:
            return "auxiliary"
        return None if node.delivered or node.id in self._children else "undelivered"

    def children(self, node_id: int | None) -> Sequence[Node]:
        """The children of a node, oldest first; of None, the roots."""
        return [self._nodes[child] for child in self._children.get(node_id, ())]

    def roots(self) -> Sequence[Node]:
        return self.children(None)

    def leaves(self) -> Sequence[Node]:
        """Nodes without children, by id."""
        return [node for node in self._nodes if node.id not in self._children]

    def path(self, node_id: int) -> Sequence[Node]:
        """From the root down to the node, both included."""
        path: list[Node] = []
        current: int | None = node_id
        while current is not None:
            path.append(self._nodes[current])
            current = path[-1].parent
        return path[::-1]

    def path_ids(self, node_id: int) -> NDArray[np.int32]:
        """All tokens from the root to the end of the node: [T]."""
        return np.concatenate([node.token_ids for node in self.path(node_id)])

    def routes(self, node_id: int) -> NDArray[np.int16] | None:
        """[T, layers, experts of a token] which experts computed each token of a node; UNKNOWN_EXPERT where nothing
        says. None: nothing says anything. Who followed the last token knows of it; the oldest is believed."""
        own = self._nodes[node_id].routes
        if own is None:
            return None
        followers = (child.routes[:1] for child in self.children(node_id) if child.routes is not None)
        return np.concatenate([own[1:], next(followers, np.full_like(own[:1], UNKNOWN_EXPERT))])

    def length(self, node_id: int) -> int:
        """How many tokens there are from the root to the end of the node."""
        return self._lengths[node_id]

    def longest_prefix(self, token_ids: ArrayLike) -> tuple[Node | None, int]:
        """The node whose whole path is the longest prefix of `token_ids`, and the length of that path.

        (None, 0) when no root matches. Nodes match whole or not at all. Among paths of equal tokens a delivered
        answer wins over one the client never got, then the newest: that is what an agent most likely continues.
        """
        wanted = np.asarray(token_ids, dtype=np.int32)
        matches = list(self._matches(wanted))
        if not matches:
            return None, 0
        return max(matches, key=lambda match: (match[1], match[0].delivered, match[0].id))

    def _matches(self, wanted: NDArray[np.int32]) -> Iterator[tuple[Node, int]]:
        """Every node whose path is a prefix of `wanted`, with the length of its path."""
        frontier: list[tuple[int | None, int]] = [(None, 0)]
        while frontier:
            parent, start = frontier.pop()
            for child in self.children(parent):
                end = start + len(child.token_ids)
                if np.array_equal(wanted[start:end], child.token_ids):
                    yield child, end
                    frontier.append((child.id, end))

    def _check_place(self, node: Node) -> None:
        if node.id != self.next_id:
            raise ValueError(f"{self._name(node)}: the next id is {self.next_id}")
        if node.parent is not None and not 0 <= node.parent < node.id:
            raise ValueError(f"{self._name(node)}: parent {node.parent} is not in the graph of {self.next_id} nodes")

    def _name(self, node: Node) -> str:
        return f"rollout {self.rollout_id!r} node {node.id}"


def _check_tokens(node: Node) -> None:
    name, length = f"node {node.id}", len(node.token_ids)
    if length == 0:
        raise ValueError(f"{name}: a node has at least one token")
    wanted = {"token_ids": np.int32, "sampled": np.bool_, "logprobs": np.float32, "versions": np.int32}
    for field, dtype in wanted.items():
        array = getattr(node, field)
        if array.shape != (length,) or array.dtype != dtype:
            raise ValueError(
                f"{name}: {field} is {array.dtype}{list(array.shape)}, expected {np.dtype(dtype)}[{length}]"
            )
    if node.routes is not None and (node.routes.shape[:1] != (length,) or node.routes.ndim != 3):
        raise ValueError(f"{name}: routes are {list(node.routes.shape)}, expected [{length}, layers, experts]")
    if int(node.token_ids.min()) < 0:
        raise ValueError(f"{name}: token ids must not be negative")
    if not np.array_equal(np.isfinite(node.logprobs), node.sampled):
        raise ValueError(f"{name}: logprobs must be finite exactly where a token was sampled")
    if not np.array_equal(node.versions != NOT_SAMPLED_VERSION, node.sampled):
        raise ValueError(f"{name}: versions must be {NOT_SAMPLED_VERSION} exactly where no token was sampled")
    if node.role != "assistant" and node.sampled.any():
        raise ValueError(f"{name}: only role 'assistant' holds sampled tokens, not {node.role!r}")


def _array(values: ArrayLike, dtype: type[Any]) -> NDArray[Any]:
    return np.asarray(values, dtype=dtype).reshape(-1)


def _frozen(values: ArrayLike, dtype: type[Any], name: str) -> NDArray[Any]:
    """A private, read-only copy: committed nodes never change."""
    array = np.array(values, dtype=dtype)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {array.shape}")
    array.setflags(write=False)
    return array
