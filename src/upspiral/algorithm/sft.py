"""Supervised fine-tuning: demonstrations are graphs whose "sampled" tokens are those to learn."""

from __future__ import annotations

from collections.abc import Sequence

from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import NodeCredit, RolloutCredit

DEMONSTRATION_GROUP = "demonstration"


def demonstration_graph(name: str, turns: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TrajectoryGraph:
    """The graph of a demonstration of one or more turns: (tokens that are given, tokens that are to be learned).

    The given tokens of a turn include the generation prompt. Learned tokens carry log-probability 0 and version 0:
    the oracle was certain. Such graphs are for the trainer only and do not belong in the store.
    """
    graph = TrajectoryGraph(name)
    for index, (given_ids, learned_ids) in enumerate(turns):
        zeros = [0] * len(learned_ids)
        run = TokenRun.answer(given_ids, learned_ids, zeros, zeros, "stop")
        graph.add(index - 1 if index else None, run, role="assistant", reason="append" if index else "root")
    return graph


def sft_credit(demonstrations: Sequence[TrajectoryGraph]) -> list[RolloutCredit]:
    """Credit 1 on every token to learn, weighted so that the loss (kind "sft") is the mean negative log-likelihood
    over all tokens to learn of `demonstrations`: pass exactly what one optimizer step sees."""
    num_tokens = sum(graph.num_sampled for graph in demonstrations)
    return [
        RolloutCredit(
            graph.rollout_id,
            DEMONSTRATION_GROUP,
            tuple(NodeCredit(node.id, positive=1.0, negative=0.0) for node in graph.nodes if node.num_sampled),
            token_weight=1.0 / max(num_tokens, 1),
        )
        for graph in demonstrations
    ]
