"""Law 8, the part that is the store's: what was committed is what is read back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Message, Role, Rollout, ToolCall

GIVEN_ROLES: list[Role] = ["user", "tool", "system"]

token = st.integers(0, 2**31 - 1)
logprob = st.floats(max_value=0.0, min_value=-(2.0**20), width=32)
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
call = st.builds(ToolCall, text, text, text)
message = st.none() | st.builds(
    Message,
    st.sampled_from(["user", "assistant", "tool"]),
    text,
    st.none() | text,
    st.tuples(call) | st.just(()),
    st.none() | text,
)


@st.composite
def graphs(draw: st.DrawFn) -> TrajectoryGraph:
    graph = TrajectoryGraph("r")
    for index in range(draw(st.integers(1, 8))):
        parent = draw(st.none() | st.integers(0, index - 1)) if index else None
        given_ids = draw(st.lists(token, min_size=1, max_size=5))
        if draw(st.booleans()):
            sampled = draw(st.lists(st.tuples(token, logprob, st.integers(0, 99)), max_size=5))
            ids, logprobs, versions = ([row[i] for row in sampled] for i in range(3))
            tokens = TokenRun.answer(given_ids, ids, logprobs, versions, "length")
            role: Role = "assistant"
        else:
            tokens, role = TokenRun.given(given_ids), draw(st.sampled_from(GIVEN_ROLES))
        graph.add(parent, tokens, role=role, reason=draw(text), message=draw(message), delivered=draw(st.booleans()))
    return graph


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 7))
def test_store_round_trip(graph: TrajectoryGraph, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = TrajectoryStore(Path(folder) / "t.db")
        store.create_rollout(Rollout("r", "t", "g"))
        store.commit("r", graph.nodes[:cut])
        store.commit("r", graph.nodes[cut:])
        store.close()
        store = TrajectoryStore(Path(folder) / "t.db")
        read = store.graph("r")
        store.close()
    assert len(read.nodes) == len(graph.nodes)
    for ours, theirs in zip(graph.nodes, read.nodes, strict=True):
        for name in ("token_ids", "sampled", "logprobs", "versions"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for name in ("id", "parent", "role", "reason", "message", "finish_reason", "delivered"):
            assert getattr(ours, name) == getattr(theirs, name)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_longest_prefix_is_the_longest_path_that_is_a_prefix(graph: TrajectoryGraph, data: st.DataObject) -> None:
    wanted = graph.path_ids(data.draw(st.integers(0, len(graph.nodes) - 1))).tolist()
    wanted = wanted[: data.draw(st.integers(0, len(wanted)))] + data.draw(st.lists(token, max_size=3))
    paths = [graph.path_ids(node.id).tolist() for node in graph.nodes]
    longest = max((len(path) for path in paths if wanted[: len(path)] == path), default=0)
    found, length = graph.longest_prefix(wanted)
    assert length == longest
    assert (found is None) == (longest == 0)
    assert found is None or graph.path_ids(found.id).tolist() == wanted[:length]
