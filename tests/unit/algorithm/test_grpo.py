"""Rewards become credit: group means, no signal, infrastructure failures and the denominators."""

from __future__ import annotations

import pytest

from tests.fixtures.demonstrations import demonstration_graph
from upspiral.algorithm.base import ScoredRollout
from upspiral.algorithm.grpo import grpo_credit
from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import AlgorithmConfig
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.trajectory.ledger import check_closed, ledger_of
from upspiral.types import Rollout, RolloutStatus


def scored(name: str, reward: float | None, lengths: tuple[int, ...] = (2,), **changes: object) -> ScoredRollout:
    graph = TrajectoryGraph(name)
    graph.add(None, TokenRun.given([1]), role="user", reason="root")
    for length in lengths:
        run = TokenRun.answer([9], [5] * length, [-1.0] * length, [0] * length, "stop")
        graph.add(0, run, role="assistant", reason="append")
    return ScoredRollout(Rollout(name, "t", "g", reward=reward, **changes), graph)  # type: ignore[arg-type]


def test_advantage_is_reward_minus_the_mean_of_the_judged() -> None:
    group = [scored("a", 1.0), scored("b", 0.0), scored("c", 0.0), scored("d", None, reason="sandbox: broke at 12:03")]
    credits = {each.rollout_id: each for each in grpo_credit({"g": group}, AlgorithmConfig())}
    assert [node.total for node in credits["a"].nodes] == pytest.approx([2 / 3])
    assert [(node.positive, node.negative) for node in credits["b"].nodes] == [(0.0, pytest.approx(-1 / 3))]
    assert credits["d"].masked == "infrastructure:sandbox"
    assert credits["a"].token_weight == pytest.approx(1 / (1 * 3 * 2))


def test_each_token_carries_the_advantage_whatever_branch_it_stands_on() -> None:
    credits = grpo_credit({"g": [scored("a", 1.0, (2, 3)), scored("b", 0.0)]}, AlgorithmConfig())
    assert [(node.node_id, node.total) for node in credits[0].nodes] == [(1, 0.5), (2, 0.5)]
    assert credits[0].token_weight == pytest.approx(1 / (1 * 2 * 5))


def test_groups_without_spread_are_masked_and_leave_the_denominator() -> None:
    groups = {
        "even": [scored("a", 1.0), scored("b", 1.0)],
        "one": [scored("c", 1.0), scored("d", None, status=RolloutStatus.FAILED)],
        "spread": [scored("e", 1.0), scored("f", 0.0)],
    }
    credits = {each.rollout_id: each for each in grpo_credit(groups, AlgorithmConfig())}
    assert [credits[name].masked for name in "abcdef"] == [
        "no_signal", "no_signal", "no_signal", "infrastructure:failed", None, None,
    ]  # fmt: skip
    assert credits["e"].token_weight == pytest.approx(1 / (1 * 2 * 2))
    for group in groups.values():
        for each in group:
            check_closed(ledger_of(each.graph, credits[each.rollout.id]), each.rollout.id)


def test_truncated_rollouts_count_with_their_reward() -> None:
    group = [scored("a", 1.0), scored("b", 0.0, status=RolloutStatus.TRUNCATED, reason="calls")]
    assert grpo_credit({"g": group}, AlgorithmConfig())[1].nodes[0].total == -0.5


def test_standard_deviation_when_asked_for() -> None:
    credits = grpo_credit({"g": [scored("a", 0.6), scored("b", 0.4)]}, AlgorithmConfig(normalize_std=True))
    assert [each.nodes[0].total for each in credits] == pytest.approx([0.5**0.5, -(0.5**0.5)])


def test_a_rollout_that_never_called_the_model_still_counts_in_the_mean() -> None:
    credits = grpo_credit({"g": [scored("a", 1.0), scored("b", 0.0, ())]}, AlgorithmConfig())
    assert credits[0].nodes[0].total == 0.5
    assert (credits[1].nodes, credits[1].masked) == ((), None)


def test_demonstrations_share_one_mean_over_their_tokens() -> None:
    graphs = [demonstration_graph("a", [([1, 2], [3, 4]), ([5], [6])]), demonstration_graph("b", [([1], [7])])]
    credits = sft_credit(graphs)
    assert [graph.path_ids(graph.next_id - 1).tolist() for graph in graphs] == [[1, 2, 3, 4, 5, 6], [1, 7]]
    assert [each.token_weight for each in credits] == [0.25, 0.25]
    assert [node.total for each in credits for node in each.nodes] == [1.0, 1.0, 1.0]
