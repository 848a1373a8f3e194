"""Group-relative policy optimisation: a rollout is as good as its reward is above the mean of its group.

Advantages as in GRPO (arXiv 2402.03300, section 4.1) without the value model; without the standard deviation unless
asked for (arXiv 2503.20783 shows the bias that it brings).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from upspiral.algorithm.base import ScoredRollout
from upspiral.config.models import AlgorithmConfig
from upspiral.types import NodeCredit, RolloutCredit

NO_SIGNAL = "no_signal"
"""Why a group whose rewards are all equal stays out of the loss: every advantage in it is zero."""
INFRASTRUCTURE = "infrastructure"
"""Why a rollout without a reward stays out of the loss (DESIGN law 6); the class of the failure follows a colon."""


def grpo_credit(groups: Mapping[str, Sequence[ScoredRollout]], config: AlgorithmConfig) -> list[RolloutCredit]:
    """The credit of every rollout of a step, in the order of `groups`.

    advantage = reward - mean reward of the judged rollouts of the group, divided by their sample standard deviation
    with `normalize_std`. Every sampled token of a rollout carries the rollout's advantage, whichever branch it stands
    on: a token with k leaves below it stands in k root-to-leaf rows, with a k-th of the advantage in each.

    token_weight = 1 / (groups with signal x judged rollouts of the group x trained tokens of the rollout): a mean over
    tokens, then rollouts, then groups, so that neither long answers nor large groups weigh more.
    """
    advantages = {group_id: _advantages(rollouts, config) for group_id, rollouts in groups.items()}
    num_signal = sum(bool(of_group) for of_group in advantages.values())
    credits: list[RolloutCredit] = []
    for group_id, rollouts in groups.items():
        of_group = advantages[group_id]
        for each in rollouts:
            if each.rollout.reward is None:
                credits.append(RolloutCredit(each.rollout.id, group_id, masked=_failure(each)))
            elif not of_group:
                credits.append(RolloutCredit(each.rollout.id, group_id, masked=NO_SIGNAL))
            else:
                credits.append(_credit(each, group_id, of_group[each.rollout.id], num_signal * len(of_group)))
    return credits


def has_signal(rollouts: Sequence[ScoredRollout]) -> bool:
    """Whether a group's rewards differ, so that it says which of its rollouts were better."""
    return len({each.rollout.reward for each in rollouts if each.rollout.reward is not None}) > 1


def _advantages(rollouts: Sequence[ScoredRollout], config: AlgorithmConfig) -> dict[str, float]:
    """The advantage of each judged rollout; empty when their rewards are all equal."""
    if not has_signal(rollouts):
        return {}
    rewards = {each.rollout.id: each.rollout.reward for each in rollouts if each.rollout.reward is not None}
    mean = statistics.fmean(rewards.values())
    scale = statistics.stdev(rewards.values()) if config.normalize_std else 1.0
    return {rollout_id: (reward - mean) / scale for rollout_id, reward in rewards.items()}


def _credit(each: ScoredRollout, group_id: str, advantage: float, denominator: int) -> RolloutCredit:
    withheld: Counter[str] = Counter()
    trained = []
    for node in each.graph.nodes:
        reason = each.graph.withheld(node)
        if reason is not None:
            withheld[reason] += node.num_sampled
        elif node.num_sampled:
            trained.append(node)
    nodes = tuple(NodeCredit(node.id, max(advantage, 0.0), min(advantage, 0.0)) for node in trained)
    num_tokens = sum(node.num_sampled for node in trained)
    # All that a rollout sampled may be withheld; then there is nothing to weigh.
    token_weight = 1.0 / (denominator * num_tokens) if num_tokens else 0.0
    return RolloutCredit(each.rollout.id, group_id, nodes, token_weight, withheld=dict(withheld))


def _failure(each: ScoredRollout) -> str:
    """The failure's class only: details differ from rollout to rollout and would split the ledger's line."""
    reason = each.rollout.reason or each.rollout.status.value
    return f"{INFRASTRUCTURE}:{reason.split(':')[0].strip()}"
