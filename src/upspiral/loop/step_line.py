"""The metric line of one training step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from upspiral.algorithm.base import ScoredRollout
from upspiral.algorithm.grpo import has_signal
from upspiral.types import RolloutCredit, RolloutStatus

Groups = Mapping[str, Sequence[ScoredRollout]]


def step_line(
    groups: Groups, credits: Sequence[RolloutCredit], trained: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Rewards, signal, tokens and speed of a step. `trained` is what the trainer measured."""
    scored = [one for group in groups.values() for one in group]
    rewards = [one.rollout.reward for one in scored if one.rollout.reward is not None]
    masked = {credit.rollout_id for credit in credits if credit.masked is not None}
    credited = {(credit.rollout_id, node.node_id) for credit in credits for node in credit.nodes}
    sampled = sum(one.graph.num_sampled for one in scored)
    nodes = [(one.rollout.id, node) for one in scored for node in one.graph.nodes]
    trained_tokens = sum(node.num_sampled for rollout_id, node in nodes if (rollout_id, node.id) in credited)
    return {
        **trained,
        "mismatch_mean_abs": trained.get("mismatch_abs"),
        "mismatch_max_abs": trained.get("max_mismatch_abs"),
        "reward_mean": fmean(rewards) if rewards else None,
        "reward_std": pstdev(rewards) if rewards else None,
        "groups_sampled": len(groups),
        "groups_with_signal": sum(has_signal(group) for group in groups.values()),
        "rollouts": len(scored),
        "rollouts_failed": sum(one.rollout.status is RolloutStatus.FAILED for one in scored),
        "failures": dict(Counter(one.rollout.reason for one in scored if one.rollout.reason)),
        "effective_batch": len(scored) - len(masked),
        "sampled_tokens": sampled,
        "trained_tokens": trained_tokens,
        "reasons": dict(Counter(node.reason for _, node in nodes)),
        "edges": dict(Counter(edge.kind for one in scored for edge in one.graph.edges)),
        "masked": dict(Counter(credit.masked for credit in credits if credit.masked is not None)),
        "seconds": dict(seconds),
        "sampled_tokens_per_s": sampled / max(seconds["collect"], 1e-9),
        "trained_tokens_per_s": trained_tokens / max(seconds["train"], 1e-9),
    }
