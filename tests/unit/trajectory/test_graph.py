"""The trajectory graph: paths, forks, prefixes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import Node


def answer(prompt: list[int], sampled: list[int]) -> TokenRun:
    return TokenRun.answer(prompt, sampled, [-0.5] * len(sampled), [3] * len(sampled), "stop")


def conversation() -> TrajectoryGraph:
    graph = TrajectoryGraph("r1")
    graph.add(None, TokenRun.given([1, 2, 3]), role="user", reason="root")
    graph.add(0, answer([9], [4, 5]), role="assistant", reason="append")
    graph.add(1, TokenRun.given([6, 7]), role="tool", reason="append")
    graph.add(0, answer([9], [4, 8]), role="assistant", reason="sibling")
    return graph


def test_path_is_root_first() -> None:
    graph = conversation()
    assert [node.id for node in graph.path(2)] == [0, 1, 2]
    assert graph.path_ids(2).tolist() == [1, 2, 3, 9, 4, 5, 6, 7]


def test_children_roots_and_leaves() -> None:
    graph = conversation()
    assert [node.id for node in graph.children(0)] == [1, 3]
    assert [node.id for node in graph.roots()] == [0]
    assert [node.id for node in graph.leaves()] == [2, 3]
    assert (graph.next_id, graph.num_sampled) == (4, 4)


@pytest.mark.parametrize(
    ("wanted", "node", "length"),
    [
        ([1, 2, 3, 9, 4, 5, 6, 7, 11], 2, 8),
        ([1, 2, 3, 9, 4, 8], 3, 6),
        ([1, 2, 3, 9, 4], 0, 3),  # whole nodes only
        ([1, 2], None, 0),
        ([], None, 0),
        ([5, 5, 5], None, 0),
    ],
)
def test_longest_prefix(wanted: list[int], node: int | None, length: int) -> None:
    found, matched = conversation().longest_prefix(wanted)
    assert (None if found is None else found.id, matched) == (node, length)


def test_longest_prefix_prefers_a_delivered_answer_then_the_newest() -> None:
    graph = conversation()
    graph.add(0, answer([9], [4, 5]), role="assistant", reason="sibling")
    graph.add(0, answer([9], [4, 5]), role="assistant", reason="sibling", delivered=False)
    found, _ = graph.longest_prefix([1, 2, 3, 9, 4, 5, 99])
    assert found is not None
    assert found.id == 4


def test_an_equal_twin_with_a_longer_continuation_wins() -> None:
    graph = conversation()
    graph.add(0, answer([9], [4, 5]), role="assistant", reason="sibling")
    found, length = graph.longest_prefix([1, 2, 3, 9, 4, 5, 6, 7])
    assert found is not None
    assert (found.id, length) == (2, 8)


def test_committed_tokens_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        conversation().nodes[0].token_ids[0] = 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": 9}, "next id is 4"),
        ({"parent": 7}, "parent 7"),
        ({"parent": -1}, "parent -1"),
        ({"token_ids": np.array([], np.int32)}, "at least one token"),
        ({"token_ids": np.array([1, -2], np.int32)}, "negative"),
        ({"token_ids": np.array([1, 2], np.int64)}, "token_ids is int64"),
        ({"sampled": np.array([True], np.bool_)}, r"sampled is bool\[1\]"),
        ({"logprobs": np.array([-1, np.nan], np.float32)}, "finite exactly where"),
        ({"versions": np.array([-1, -1], np.int32)}, "versions must be -1"),
        ({"role": "tool"}, "only role 'assistant'"),
        ({"parent": None, "sampled": np.array([True, True])}, "finite|root"),
    ],
)
def test_bad_nodes_are_refused(changes: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "id": 4,
        "parent": 2,
        "role": "assistant",
        "reason": "append",
        "token_ids": np.array([1, 2], np.int32),
        "sampled": np.array([False, True]),
        "logprobs": np.array([np.nan, -1], np.float32),
        "versions": np.array([-1, 0], np.int32),
    }
    with pytest.raises(ValueError, match=message):
        conversation().append(Node(**{**fields, **changes}))  # type: ignore[arg-type]


def test_a_sampled_first_token_of_a_root_is_refused() -> None:
    with pytest.raises(ValueError, match="first token of a root"):
        TrajectoryGraph("r").add(None, answer([], [1]), role="assistant", reason="root")
