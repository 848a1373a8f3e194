"""The whole loop in a Ray cluster on this machine: the same results as without, and nothing lost when actors die."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("torch", reason="needs the [train] extra")
pytest.importorskip("ray", reason="needs the [ray] extra")

from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import FIXTURES, recipe, steps_of
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import RolloutStatus

HERE = {"engine.exact": "true", "trainer.kind": "fsdp", "trainer.parallel.ranks": "2"}
ON_RAY = {"cluster.address": "local", "cluster.engines": "2", "cluster.sandbox_hosts": "2"}
ROLLOUTS = {"algorithm.group_size": "16", "algorithm.groups_per_step": "4", "algorithm.max_groups_per_step": "4"}
"""64 of a step, begun at once."""
ACTORS = ("EngineHost", "RankHost", "SandboxHost", "RunHost")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def started(file: Path, folder: Path, flags: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "upspiral", "run", str(file), "--run", str(folder)]
    command += [word for key, value in flags.items() for word in (f"--{key}", value)]
    return subprocess.Popen(command, start_new_session=True)


def finish(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    try:
        assert process.wait(timeout_s) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def learned(folder: Path) -> list[dict[str, Any]]:
    """What a run's steps say that does not depend on the clock."""
    timed = ("time", "second", "per_s")
    return [
        {name: value for name, value in line.items() if not any(word in name for word in timed)}
        for line in steps_of(folder)
    ]


def sampled(folder: Path) -> dict[str, list[tuple[list[int], list[float], list[int]]]]:
    """Tokens, log-probabilities and versions of every rollout."""
    store = TrajectoryStore(folder / "trajectories.db", create=False)
    try:
        return {
            rollout.id: [
                (node.token_ids.tolist(), node.logprobs[node.sampled].tolist(), node.versions.tolist())
                for node in store.graph(rollout.id).nodes
            ]
            for rollout in store.rollouts()
            if rollout.status is not RolloutStatus.CANCELLED
        }
    finally:
        store.close()


def left_over() -> list[str]:
    return [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline"])
        if any(is_actor(process, name) for name in ACTORS)
    ]


@pytest.mark.timeout(400)
def test_the_same_results_as_without_ray(tmp_path: Path, model: Path) -> None:
    """With 64 rollouts that live at once, each in a sandbox: see `meeting_agent.py`."""
    file = recipe(tmp_path, model, steps=2)
    flags = HERE | ROLLOUTS | {"agent.file": str(FIXTURES / "meeting_agent.py")}
    for name, place in (("here", {}), ("ray", ON_RAY)):
        finish(started(file, tmp_path / name, flags | place), 180)
    assert [line["rollouts_failed"] for line in steps_of(tmp_path / "ray")] == [0, 0]
    here, there = sampled(tmp_path / "here"), sampled(tmp_path / "ray")
    assert len(here) >= 2 * 64
    assert here == there
    assert learned(tmp_path / "here") == learned(tmp_path / "ray")
    assert left_over() == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killing_any_actor_loses_nothing(tmp_path: Path, model: Path) -> None:
    """Twenty times, whichever it is."""
    folder, chance = tmp_path / "run", random.Random(0)
    flags = HERE | ON_RAY | ROLLOUTS | {"cluster.restarts": "100"}
    process = started(recipe(tmp_path, model, steps=400), folder, flags)
    killed: list[str] = []
    stored: dict[str, int] = {}
    try:
        while len(killed) < 20:
            before = len(steps_of(folder)) if (folder / "metrics.jsonl").exists() else 0
            until(lambda before=before: (folder / "metrics.jsonl").exists() and len(steps_of(folder)) > before, 200)
            stored |= committed(folder)
            name = ACTORS[len(killed) % len(ACTORS)]
            found = [each for each in psutil.process_iter(["cmdline"]) if is_actor(each, name)]
            if not found:
                continue  # it is being started
            chance.choice(found).kill()
            killed.append(name)
        before = len(steps_of(folder))
        until(lambda: len(steps_of(folder)) > before + 2, 200)
    finally:
        process.send_signal(signal.SIGINT)
        time.sleep(20)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    there = committed(folder)
    assert {name: there.get(name) for name in stored} == stored, "a rollout that had ended is not what it was"
    steps = steps_of(folder)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert all(line["ledger"]["difference"] == 0 for line in steps)
    failed = sum(line["rollouts_failed"] for line in steps)
    fatal = sum(name in ("EngineHost", "SandboxHost") for name in killed)
    assert failed <= 64 * fatal, "more than lived in those that died: others were refused, too"
    print(f"{len(steps)} steps, {len(killed)} kills, {failed} rollouts masked as failed of {64 * len(steps)}")
    until(lambda: left_over() == [], 60)


def committed(folder: Path) -> dict[str, int]:
    """Tokens of every rollout that has ended."""
    store = TrajectoryStore(folder / "trajectories.db", create=False)
    try:
        ended = [each for each in store.rollouts() if each.status is RolloutStatus.FINISHED]
        return {each.id: sum(len(node.token_ids) for node in store.graph(each.id).nodes) for each in ended}
    finally:
        store.close()


def until(holds: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.5)


def is_actor(process: psutil.Process, name: str) -> bool:
    return any(f"ray::{name}" in word for word in process.info["cmdline"] or ())
