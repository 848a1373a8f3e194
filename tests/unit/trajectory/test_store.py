"""The store: what was committed is read back, survives kill -9, and every failure says what to do."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from upspiral.errors import StoreError
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Message, Node, NodeCredit, Rollout, RolloutCredit, RolloutStatus, ToolCall


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrajectoryStore]:
    store = TrajectoryStore(tmp_path / "trajectories.db")
    yield store
    store.close()


def rollout(name: str, **changes: object) -> Rollout:
    return Rollout(name, task_id="t", group_id="g", **changes)  # type: ignore[arg-type]


def short_graph(name: str) -> TrajectoryGraph:
    graph = TrajectoryGraph(name)
    message = Message("assistant", "ok", "hm", (ToolCall("c1", "bash", '{"command": "ls é"}'),))
    graph.add(None, TokenRun.given([1, 2]), role="user", reason="root", message=Message("user", "hi"))
    answer = TokenRun.answer([9], [4, 5], [-0.25, -1.5], [0, 1], "stop")
    graph.add(0, answer, role="assistant", reason="append", message=message, delivered=False)
    return graph


def fill(store: TrajectoryStore, name: str, **changes: object) -> TrajectoryGraph:
    graph = short_graph(name)
    store.create_rollout(rollout(name, **changes))
    store.commit(name, graph.nodes)
    return graph


def same_node(a: Node, b: Node) -> bool:
    arrays = ("token_ids", "sampled", "logprobs", "versions")
    plain = ("id", "parent", "role", "reason", "message", "finish_reason", "delivered", "auxiliary")
    return all(
        np.array_equal(getattr(a, x), getattr(b, x), equal_nan=x == "logprobs")
        and getattr(a, x).dtype == getattr(b, x).dtype
        for x in arrays
    ) and all(getattr(a, x) == getattr(b, x) for x in plain)


def test_nodes_come_back_as_they_were(store: TrajectoryStore) -> None:
    written = fill(store, "r1").nodes
    read = store.graph("r1").nodes
    assert len(read) == len(written)
    assert all(same_node(a, b) for a, b in zip(read, written, strict=True))


def test_rollouts_are_filtered_and_in_order(store: TrajectoryStore) -> None:
    for name, split, step in [("b", "train", 1), ("a", "train", 2), ("c", "eval", 1)]:
        store.create_rollout(rollout(name, split=split, step=step, instruction="do it"))
    store.finish_rollout("a", status=RolloutStatus.FINISHED, reward=0.5, answer="42")
    assert [each.id for each in store.rollouts()] == ["b", "a", "c"]
    assert [each.id for each in store.rollouts(split="train", step=1)] == ["b"]
    finished = store.rollouts(status=RolloutStatus.FINISHED)
    assert finished == [
        rollout("a", step=2, instruction="do it", status=RolloutStatus.FINISHED, reward=0.5, answer="42")
    ]
    assert store.rollout("a") == finished[0]


def test_a_commit_is_all_or_nothing(store: TrajectoryStore) -> None:
    graph = fill(store, "r1")
    with pytest.raises(StoreError, match="commit nodes of rollout 'r1'"):
        extended = short_graph("r1")
        extended.add(1, TokenRun.given([7]), role="tool", reason="append")
        store.commit("r1", [extended.nodes[2], graph.nodes[1]])  # the second is there already
    assert len(store.graph("r1").nodes) == 2


def test_unknown_rollouts_are_named(store: TrajectoryStore) -> None:
    for call in (
        lambda: store.rollout("nope"),
        lambda: store.finish_rollout("nope", status=RolloutStatus.FINISHED),
        lambda: store.commit("nope", short_graph("nope").nodes),
    ):
        with pytest.raises(StoreError, match="nope"):
            call()
    assert store.graph("nope").nodes == []


def test_credits_of_a_step_replace_those_of_an_earlier_try(store: TrajectoryStore) -> None:
    fill(store, "r1")
    fill(store, "r2")
    credits = [
        RolloutCredit("r1", "g", (NodeCredit(1, 0.5, -0.25),), 0.125),
        RolloutCredit("r2", "g", masked="no_signal"),
    ]
    store.record_step(3, [RolloutCredit("r1", "g", masked="interrupted")])
    store.record_step(3, credits)
    assert store.credits(step=3) == credits
    assert store.credits(rollout_id="r2") == credits[1:]
    assert store.credits(step=4) == []


def test_a_rollout_is_credited_by_one_step_only(store: TrajectoryStore) -> None:
    fill(store, "r1")
    store.record_step(1, [RolloutCredit("r1", "g", (NodeCredit(1, 1.0, 0.0),), 1.0)])
    with pytest.raises(StoreError, match="enters the loss once"):
        store.record_step(2, [RolloutCredit("r1", "g", masked="again")])
    assert len(store.credits(step=1)) == 1


def test_the_ledger_of_a_run(store: TrajectoryStore) -> None:
    for name, split in [("trained", "train"), ("masked", "train"), ("measured", "eval"), ("live", "train")]:
        fill(store, name, split=split)
    fill(store, "stopped")
    store.finish_rollout("measured", status=RolloutStatus.FINISHED, reward=1.0)
    store.finish_rollout("stopped", status=RolloutStatus.CANCELLED, reason="run stopped")
    store.record_step(
        0,
        [
            RolloutCredit("trained", "g", (NodeCredit(1, 1.0, 0.0),), 1.0),
            RolloutCredit("masked", "g", masked="no_signal"),
        ],
    )
    ledger = store.ledger()
    assert (ledger.sampled, ledger.trained, ledger.difference) == (10, 2, 0)
    assert dict(ledger.masked) == {"no_signal": 2, "evaluation": 2}
    assert dict(ledger.dropped) == {"running": 2, "run stopped": 2}
    assert store.ledger(split="eval").sampled == 2


def test_a_finished_rollout_without_credit_keeps_the_ledger_open(store: TrajectoryStore) -> None:
    fill(store, "r1")
    store.finish_rollout("r1", status=RolloutStatus.FINISHED, reward=1.0)
    assert store.ledger().difference == 2


def test_readers_work_while_another_thread_writes(store: TrajectoryStore) -> None:
    failures: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(50):
                for each in store.rollouts():
                    assert len(store.graph(each.id).nodes) in (0, 2)
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(50):
        fill(store, f"r{index}")
    reader.join(timeout=30)
    assert not failures
    assert not reader.is_alive()


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
"""For child processes: they import what this process imports."""

KILLED_WRITER = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_store import fill, rollout, short_graph
from upspiral.trajectory.store import TrajectoryStore
store = TrajectoryStore(sys.argv[1])
for index in range(20):
    fill(store, f"r{index}")
    print(index, flush=True)
store._connection.execute("BEGIN")
store._connection.execute("DELETE FROM nodes")  # not committed: must not be seen
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_no_committed_node(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.db"
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(path), here],
        capture_output=True,
        timeout=60,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    store = TrajectoryStore(path)
    assert [len(store.graph(each.id).nodes) for each in store.rollouts()] == [2] * 20
    fill(store, "after")
    assert len(store.graph("after").nodes) == 2
    store.close()


FULL_DISK_WRITER = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from test_store import fill
from upspiral.errors import StoreError
from upspiral.trajectory.store import TrajectoryStore
store = TrajectoryStore(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
kept = 0
try:
    for index in range(10_000):
        fill(store, f"r{index}")
        kept += 1
except StoreError as error:
    print(kept)
    print(error)
"""


def test_a_full_disk_says_so_and_keeps_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.db"
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK_WRITER, str(path), str(Path(__file__).parent)],
        capture_output=True,
        timeout=60,
        check=True,
        env=ENVIRONMENT,
    )
    kept, message = done.stdout.decode().splitlines()
    assert str(path) in message
    assert "free space" in message
    store = TrajectoryStore(path)
    assert sum(len(store.graph(each.id).nodes) == 2 for each in store.rollouts()) == int(kept)
    store.close()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="damaged"):
        TrajectoryStore(path)


def test_another_schema_version(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="schema version 99"):
        TrajectoryStore(path)


def test_a_file_from_before_routes_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.db"
    store = TrajectoryStore(path)
    fill(store, "r1")
    store.close()
    connection = sqlite3.connect(path)
    connection.executescript("ALTER TABLE nodes DROP COLUMN routes; PRAGMA user_version = 2")
    connection.close()
    store = TrajectoryStore(path)
    assert [node.routes for node in store.graph("r1").nodes] == [None] * len(short_graph("r1").nodes)
    fill(store, "r2")
    assert len(store.graph("r2").nodes) == len(short_graph("r2").nodes)
    store.close()


def test_a_damaged_blob(tmp_path: Path) -> None:
    path = tmp_path / "trajectories.db"
    store = TrajectoryStore(path)
    fill(store, "r1")
    other = sqlite3.connect(path)
    other.execute("UPDATE nodes SET logprobs = x'0000'")
    other.commit()
    other.close()
    with pytest.raises(StoreError, match="rollout 'r1'"):
        store.graph("r1")
    store.close()


def test_a_missing_store_is_not_created_for_readers(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no trajectory store"):
        TrajectoryStore(tmp_path / "trajectories.db", create=False)
    assert not any(tmp_path.iterdir())


def test_a_closed_store_says_so(store: TrajectoryStore) -> None:
    store.close()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.rollouts()
