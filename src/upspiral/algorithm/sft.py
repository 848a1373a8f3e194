"""Supervised fine-tuning: demonstrations are graphs whose "sampled" tokens are those to learn."""

from __future__ import annotations

from collections.abc import Sequence

from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import NodeCredit, RolloutCredit

DEMONSTRATION_GROUP = "demonstration"


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
