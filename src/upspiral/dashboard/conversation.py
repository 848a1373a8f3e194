"""A rollout as a person reads it: turns with commands, tokens and advantages, made from its trajectory graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp

import numpy as np

from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.ledger import account_uncredited, ledger_of
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Ledger, Message, Node, NodeCredit, Rollout, RolloutCredit, ToolCall

TokenTexts = Callable[[Sequence[int]], list[str]]
"""Token ids to one text each; a character of several tokens stands at its last one, "" at the others."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One sampled token."""

    text: str
    token_id: int
    logprob: float
    version: int

    @property
    def probability(self) -> float:
        return min(exp(self.logprob), 1.0)


@dataclass(frozen=True, slots=True)
class Turn:
    """One node of the graph."""

    node: Node
    text: str
    """What the message says, tool calls left out."""
    commands: tuple[str, ...]
    """Its tool calls, each as a person would type it."""
    pieces: tuple[Piece, ...]
    """Its sampled tokens; empty without a tokenizer."""
    credit: NodeCredit | None
    depth: int
    """How many branch points lie above it."""
    branches_from: int | None
    """Where the node hangs, said only where that is not the turn right above."""

    @property
    def role(self) -> str:
        return self.node.role

    @property
    def mean_logprob(self) -> float | None:
        return float(self.node.logprobs[self.node.sampled].mean()) if self.node.num_sampled else None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A rollout with all its turns, each branch after the turn it leaves from."""

    rollout: Rollout
    turns: tuple[Turn, ...]
    credit: RolloutCredit | None
    ledger: Ledger

    @property
    def is_tree(self) -> bool:
        return any(turn.depth for turn in self.turns)

    @property
    def calls(self) -> int:
        """How many answers the model gave."""
        return sum(1 for turn in self.turns if turn.node.num_sampled)


def read_conversation(store: TrajectoryStore, rollout: Rollout, token_texts: TokenTexts | None) -> Conversation:
    """Reads a rollout. Without `token_texts` (the tokenizer is not at hand) turns have text but no pieces."""
    graph = store.graph(rollout.id)
    credit = next(iter(store.credits(rollout_id=rollout.id)), None)
    by_node = {node.node_id: node for node in credit.nodes} if credit else {}
    turns: list[Turn] = []
    for node, depth in _in_reading_order(graph):
        expected = turns[-1].node.id if turns else None
        text, commands = _said(node.message)
        turns.append(
            Turn(
                node=node,
                text=text,
                commands=commands,
                pieces=tuple(_pieces(node, token_texts)) if token_texts else (),
                credit=by_node.get(node.id),
                depth=depth,
                branches_from=node.parent if node.parent != expected else None,
            )
        )
    ledger = ledger_of(graph, credit) if credit else account_uncredited(rollout, graph.num_sampled)
    return Conversation(rollout, tuple(turns), credit, ledger)


def _in_reading_order(graph: TrajectoryGraph) -> Iterator[tuple[Node, int]]:
    """Depth first, so that a branch reads as one conversation; depth grows where the path forks."""
    stack = [(root, 1 if len(graph.roots()) > 1 else 0) for root in reversed(graph.roots())]
    while stack:
        node, depth = stack.pop()
        yield node, depth
        children = graph.children(node.id)
        below = depth + 1 if len(children) > 1 else depth
        stack.extend((child, below) for child in reversed(children))


def _said(message: Message | None) -> tuple[str, tuple[str, ...]]:
    if message is None:
        return "", ()
    text = f"{message.thinking}\n{message.text}" if message.thinking else message.text
    return text, tuple(_as_command(call) for call in message.tool_calls)


def _as_command(call: ToolCall) -> str:
    """The command itself for a tool that takes nothing else, name(arguments) for any other."""
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = None
    if isinstance(arguments, dict) and list(arguments) == ["command"] and isinstance(arguments["command"], str):
        return arguments["command"]
    return f"{call.name}({call.arguments})"


def _pieces(node: Node, token_texts: TokenTexts) -> Iterator[Piece]:
    positions = np.flatnonzero(node.sampled)
    texts = token_texts([int(node.token_ids[position]) for position in positions])
    for position, text in zip(positions, texts, strict=True):
        yield Piece(text, int(node.token_ids[position]), float(node.logprobs[position]), int(node.versions[position]))
