"""Exports hold what the store holds."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from upspiral.errors import StoreError
from upspiral.trajectory.export import export_jsonl, export_parquet
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Message, NodeCredit, Rollout, RolloutCredit


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    store = TrajectoryStore(tmp_path / "trajectories.db")
    for name in ("r1", "r2"):
        graph = TrajectoryGraph(name)
        graph.add(None, TokenRun.given([1, 2]), role="user", reason="root", message=Message("user", "hi"))
        answer = TokenRun.answer([9], [4], [-0.5], [7], "stop")
        graph.add(0, answer, role="assistant", reason="append", message=Message("assistant", "ho"))
        store.create_rollout(Rollout(name, "t", "g", step=3))
        store.commit(name, graph.nodes)
    store.record_step(3, [RolloutCredit("r1", "g", (NodeCredit(1, 0.5, 0.0),), 0.25)])
    return store


def test_jsonl(store: TrajectoryStore, tmp_path: Path) -> None:
    assert export_jsonl(store, tmp_path / "out.jsonl") == 2
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["id"] == "r1"
    assert first["credit"]["nodes"] == [{"node_id": 1, "positive": 0.5, "negative": 0.0}]
    assert first["nodes"][1]["logprobs"] == [None, -0.5]
    assert first["nodes"][1]["message"]["text"] == "ho"
    assert second["credit"] is None


def test_parquet(store: TrajectoryStore, tmp_path: Path) -> None:
    assert export_parquet(store, tmp_path / "out.parquet") == 4
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["rollout_id"], row["node_id"]) for row in rows] == [("r1", 0), ("r1", 1), ("r2", 0), ("r2", 1)]
    assert rows[1]["token_ids"] == [9, 4]
    assert rows[1]["sampled"] == [False, True]
    assert rows[1]["versions"] == [-1, 7]
    assert (rows[1]["positive"], rows[0]["positive"], rows[3]["masked"]) == (0.5, None, None)


@pytest.mark.parametrize("export", [export_jsonl, export_parquet])
def test_an_unwritable_target_is_named(store: TrajectoryStore, tmp_path: Path, export) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StoreError, match="no/such/folder"):
        export(store, tmp_path / "no/such/folder/out")
