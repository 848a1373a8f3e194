"""What packing shares, splits and leaves out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from upspiral.trainer.forest import Item, pack
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import NodeCredit, RolloutCredit

SYSTEM = list(range(100, 120))


def rollout(name: str, group: int, turns: Sequence[int] = (4, 4), masked: str | None = None) -> Item:
    """Shared system tokens, a prompt of 10 of the group's own, then turns of sampled tokens and tool results."""
    graph = TrajectoryGraph(name)
    graph.add(None, TokenRun.given(SYSTEM), role="system", reason="root")
    graph.add(0, TokenRun.given([group] * 10), role="user", reason="append")
    for length in turns:
        run = TokenRun.answer([1, 2], [7] * length, [-1.0] * length, [0] * length, "stop")
        graph.add(graph.next_id - 1, run, role="assistant", reason="append")
        graph.add(graph.next_id - 1, TokenRun.given([8, 8, 8]), role="tool", reason="append")
    nodes = tuple(NodeCredit(node.id, 1.0, 0.0) for node in graph.nodes if node.num_sampled)
    return graph, RolloutCredit(name, str(group), () if masked else nodes, 0.5, masked)


def test_shared_prefixes_stand_once() -> None:
    items = [rollout(f"{group}-{index}", group) for group in (50, 60) for index in range(3)]
    [batch] = pack(items, tokens_per_microbatch=1000)
    # A rollout's own tokens: 4 sampled, 3 tool, 2 of the next generation prompt, 4 sampled less the last, which
    # predicts nothing. The group's: 10 of the prompt and the first generation prompt of 2.
    assert batch.num_tokens == 20 + 2 * (10 + 2) + 6 * (4 + 3 + 2 + 3)
    assert batch.num_targets == 6 * 8
    assert (batch.node_parent_N == -1).sum() == 1
    assert len(batch.node_start_N) == 1 + 2 + 6


def test_masked_rollouts_do_not_enter() -> None:
    [batch] = pack([rollout("a", 50), rollout("b", 60, masked="no_signal")], tokens_per_microbatch=1000)
    assert batch.rollout_ids == ("a",)
    assert pack([rollout("b", 60, masked="no_signal")], tokens_per_microbatch=1000) == []


def test_a_tree_over_the_budget_is_split_without_repeating_anything() -> None:
    items = [rollout(f"{group}-{index}", group) for group in (50, 60, 70) for index in range(3)]
    group = 12 + 3 * 12
    batches = pack(items, tokens_per_microbatch=2 * group)
    # What is kept for those below is the path to them and nothing beside it.
    assert [batch.num_tokens for batch in batches] == [20, 2 * group, group]
    assert [batch.context_length for batch in batches] == [0, 20, 20]


def test_a_path_longer_than_the_budget_is_cut() -> None:
    batches = pack([rollout("a", 50), rollout("b", 50)], tokens_per_microbatch=5)
    assert sum(batch.num_tokens for batch in batches) == 20 + 12 + 2 * 12
    assert all(batch.num_tokens <= 5 for batch in batches)
    assert sum(batch.num_targets for batch in batches) == 16


def test_lanes_repeat_a_path_only_where_that_is_sooner_done() -> None:
    def cost_of(turns: Sequence[int], *, apart: bool = False) -> list[int]:
        items = [rollout(f"a-{index}", 50, turns) for index in range(4)]
        return [batch.num_tokens for batch in pack(items, tokens_per_microbatch=10**6, lanes=2, apart=apart)]

    assert cost_of((2,)) == [20 + 12 + 4 * 1]
    assert cost_of((2000,)) == [20 + 12 + 2 * 1999] * 2
    assert cost_of((2,), apart=True) == [20 + 12 + 2 * 1] * 2
    assert cost_of((1,), apart=True) == [20 + 12]


def test_minibatches_split_by_groups_and_keep_each_a_mean() -> None:
    items = [rollout(f"{group}-{index}", group) for group in (50, 60, 70) for index in range(2)]
    batches = pack(items, tokens_per_microbatch=1000, minibatches=2)
    groups = [{batch.rollout_ids[i][:2] for i in batch.rollout_M} for batch in batches]
    assert groups == [{"50", "70"}, {"60"}]
    assert [batch.minibatch for batch in batches] == [0, 1]
    assert [set(batch.token_weight_M.tolist()) for batch in batches] == [{0.5 * 3 / 2}, {0.5 * 3}]


def test_equal_answers_of_two_rollouts_are_not_merged() -> None:
    [batch] = pack([rollout("a", 50, (3,)), rollout("b", 50, (3,))], tokens_per_microbatch=1000)
    assert batch.num_targets == 6
    assert np.unique(batch.sources_M).size == 5  # both first tokens are predicted by the same prompt token


def test_very_deep_rollouts_need_no_recursion() -> None:
    [batch] = pack([rollout("a", 50, (2,) * 2000)], tokens_per_microbatch=10**6, lanes=2)
    assert len(batch.node_start_N) == 1
    assert batch.num_targets == 4000
