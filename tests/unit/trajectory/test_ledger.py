"""The ledger closes, or says what is missing."""

from __future__ import annotations

import pytest

from upspiral.errors import LedgerError
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.trajectory.ledger import check_closed, ledger_of
from upspiral.types import Ledger, NodeCredit, RolloutCredit


@pytest.fixture
def graph() -> TrajectoryGraph:
    graph = TrajectoryGraph("r1")
    graph.add(None, TokenRun.given([1, 2]), role="user", reason="root")
    for length in (2, 3):
        answer = TokenRun.answer([9], [5] * length, [-1.0] * length, [0] * length, "stop")
        graph.add(0, answer, role="assistant", reason="append")
    return graph


def test_trained(graph: TrajectoryGraph) -> None:
    credit = RolloutCredit("r1", "g", (NodeCredit(1, 1.0, 0.0), NodeCredit(2, 0.0, 0.0)), 0.1)
    ledger = ledger_of(graph, credit)
    assert ledger == Ledger(5, 5)
    check_closed(ledger, "step 1")


def test_masked(graph: TrajectoryGraph) -> None:
    assert ledger_of(graph, RolloutCredit("r1", "g", masked="no_signal")) == Ledger(5, 0, {"no_signal": 5})
    assert ledger_of(graph, None, default_mask_reason="evaluation") == Ledger(5, 0, {"evaluation": 5})


def test_a_forgotten_node_is_named_by_its_tokens(graph: TrajectoryGraph) -> None:
    ledger = ledger_of(graph, RolloutCredit("r1", "g", (NodeCredit(1, 1.0, 0.0),), 0.1))
    with pytest.raises(LedgerError, match=r"step 4 does not close: 3 tokens unaccounted for \(sampled 5, trained 2"):
        check_closed(ledger, "step 4")


def test_a_double_count_is_told_apart() -> None:
    with pytest.raises(LedgerError, match="2 tokens counted twice"):
        check_closed(Ledger(3, 3, {"no_signal": 2}), "the run")


def test_ledgers_add_up() -> None:
    total = Ledger(5, 5) + Ledger(3, 0, {"a": 3}) + Ledger(4, 0, {"a": 1}, {"b": 3})
    assert total == Ledger(12, 5, {"a": 4}, {"b": 3})
