"""The whole loop in a Ray cluster on this machine: the same results as without, and nothing lost when actors die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("torch", reason="needs the [train] extra")
pytest.importorskip("ray", reason="needs the [ray] extra")

from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import recipe, steps_of
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import RolloutStatus

ON_RAY = {
    "cluster.address": "local", "cluster.engines": "2", "cluster.sandbox_hosts": "1", "engine.exact": "true",
}  # fmt: skip
HERE = {"engine.exact": "true"}
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
        if any(f"ray::{name}" in " ".join(process.info["cmdline"] or ()) for name in ACTORS)
    ]


@pytest.mark.timeout(400)
def test_the_same_results_as_without_ray(tmp_path: Path, model: Path) -> None:
    file = recipe(tmp_path, model, steps=3)
    for name, flags in (("here", HERE), ("ray", ON_RAY)):
        finish(started(file, tmp_path / name, flags), 180)
    here, there = sampled(tmp_path / "here"), sampled(tmp_path / "ray")
    assert len(here) >= 3 * 32
    assert here == there
    assert learned(tmp_path / "here") == learned(tmp_path / "ray")
    assert left_over() == []
