"""Law 8, the part that is the store's: what was committed is what is read back."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from upspiral.algorithm.base import ScoredRollout
from upspiral.algorithm.grpo import grpo_credit
from upspiral.config.models import AlgorithmConfig
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.trajectory.ledger import check_closed, ledger_of
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Edge, Message, Role, Rollout, ToolCall

kinds = st.sampled_from(["spawn", "join", "compaction", "retry"])
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
        shape = draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 2)))
        if shape is not None:
            routes = draw(arrays(np.int16, (len(tokens.token_ids), *shape), elements=st.integers(-1, 300)))
            tokens = replace(tokens, routes=routes)
        graph.add(
            parent, tokens, role=role, reason=draw(text), message=draw(message),
            delivered=draw(st.booleans()), auxiliary=draw(text),
        )  # fmt: skip
    ends = st.integers(0, graph.next_id - 1)
    for edge in draw(st.lists(st.builds(Edge, kinds, ends, ends, st.sampled_from(["content", "header"])), max_size=4)):
        known = [(each.kind, each.source, each.target) for each in graph.edges]
        if edge.source != edge.target and (edge.kind, edge.source, edge.target) not in known:
            graph.connect(edge)
    return graph


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_every_sampled_token_is_trained_or_withheld_for_a_reason(graph: TrajectoryGraph) -> None:
    other = TrajectoryGraph("other")
    other.add(None, TokenRun.answer([1], [2], [-1.0], [0], "stop"), role="assistant", reason="root")
    group = [
        ScoredRollout(Rollout(one.rollout_id, "t", "g", reward=reward), one)
        for one, reward in ((graph, 1.0), (other, 0.0))
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = TrajectoryStore(Path(folder) / "trajectories.db")
        for each in group:
            store.create_rollout(each.rollout)
            store.commit(each.rollout.id, each.graph.nodes, each.graph.edges)
        credits = grpo_credit({"g": group}, AlgorithmConfig())
        store.record_step(1, credits)
        ledger = store.ledger()
        assert store.credits(step=1) == credits
        store.close()
    assert ledger == ledger_of(graph, credits[0]) + ledger_of(other, credits[1])
    check_closed(ledger, "the step")
    withheld = {node.id for node in graph.nodes if graph.withheld(node)}
    assert withheld.isdisjoint(node.node_id for node in credits[0].nodes)
    assert ledger.sampled == graph.num_sampled + 1 and sum(ledger.masked.values()) == sum(
        graph.nodes[index].num_sampled for index in withheld
    )


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(1, 7))
def test_store_round_trip(graph: TrajectoryGraph, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = TrajectoryStore(Path(folder) / "t.db")
        store.create_rollout(Rollout("r", "t", "g"))
        store.commit("r", graph.nodes[:cut])
        store.commit("r", graph.nodes[cut:], graph.edges)
        store.close()
        store = TrajectoryStore(Path(folder) / "t.db")
        read = store.graph("r")
        store.close()
    assert len(read.nodes) == len(graph.nodes)
    assert read.edges == graph.edges
    for ours, theirs in zip(graph.nodes, read.nodes, strict=True):
        for name in ("token_ids", "sampled", "logprobs", "versions", "routes"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for name in ("id", "parent", "role", "reason", "message", "finish_reason", "delivered", "auxiliary"):
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
