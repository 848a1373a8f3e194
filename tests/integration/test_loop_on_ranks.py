"""A run whose trainer is two processes learns what it learns in one, also when it is stopped and resumed, with ranks
that divide the model as before or otherwise."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.published_weights import largest_difference, same, weights_of_folder
from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import recipe, steps_of
from upspiral.cli.main import run_command
from upspiral.config.loader import load_run_config
from upspiral.loop.run import run_training
from upspiral.monitor.progress import LiveProgress

ON_RANKS = {"trainer.kind": "fsdp", "trainer.parallel.ranks": "2", "weights.transport": "disk"}
OTHERWISE = {**ON_RANKS, "trainer.parallel.tensor": "2"}


def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")

    def run(name: str, steps: int, overrides: dict[str, str], *, resume: bool = False) -> list[dict]:
        config = load_run_config(recipe(tmp_path, model, steps=steps), overrides)
        run_training(config, tmp_path / name, resume=resume, progress=LiveProgress(name, steps, quiet=True))
        return steps_of(tmp_path / name)

    wanted = run("local", 3, {})
    assert all(line["seconds"]["publish"] == 0 for line in wanted), "engine and trainer share their weights"
    run("ranks", 2, ON_RANKS)
    shutil.copytree(tmp_path / "ranks", tmp_path / "otherwise")
    for name, overrides in (("ranks", ON_RANKS), ("otherwise", OTHERWISE)):
        found = run(name, 3, overrides, resume=True)
        assert [line["reward_mean"] for line in found] == [line["reward_mean"] for line in wanted]
        assert [line["trained_tokens"] for line in found] == [line["trained_tokens"] for line in wanted]
        assert all(0 < line["seconds"]["publish"] < line["seconds"]["total"] for line in found)
        grad_norms = [line["grad_norm"] for line in wanted]
        assert [line["grad_norm"] for line in found] == pytest.approx(grad_norms, rel=1e-4)
    kept, divided = (weights_of_folder(tmp_path / name / "weights" / "v000003") for name in ("ranks", "otherwise"))
    assert 0 < largest_difference(divided, kept) <= 1e-5

    assert run_command(["export", str(tmp_path / "otherwise"), "--hf", str(tmp_path / "exported")]) == 0
    exported = weights_of_folder(tmp_path / "exported")
    assert same(exported, {name: divided[name] for name in exported})


def test_ranks_that_torchrun_starts_as_the_run_says_learn_what_started_ones_do(tmp_path: Path) -> None:
    file = recipe(tmp_path, make_model(tmp_path / "model"), steps=2)
    flags = {**ON_RANKS, "engine.exact": "true", "eval.tasks": "1"}
    run_training(
        load_run_config(file, flags), tmp_path / "started", resume=False, progress=LiveProgress("", 2, quiet=True)
    )
    listen, folder = f"127.0.0.1:{free_port()}", tmp_path / "listening"
    del flags["weights.transport"]  # "auto" knows that the first rank may be on another machine
    run = subprocess.Popen(
        [sys.executable, "-m", "upspiral", "run", str(file), "--run", str(folder), "--trainer.parallel.listen", listen]
        + [word for key, value in flags.items() for word in (f"--{key}", value)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    torchrun = None
    try:
        assert run.stdout is not None
        says = next((line for line in run.stdout if "torchrun" in line), "")
        assert listen in says, "the run ended"
        assert stat.S_IMODE((folder / "trainer.key").stat().st_mode) == 0o600
        says = re.sub("NODES", "1", re.sub("RANKS", "2", says)).replace("FIRST_NODE:29500", f"127.0.0.1:{free_port()}")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        torchrun = subprocess.Popen(f"exec env {says}", shell=True, env={**os.environ, "PATH": path})
        run.communicate(timeout=120)
        assert (run.returncode, torchrun.wait(30)) == (0, 0)
    finally:
        for process in (run, torchrun):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait(30)
    assert not (folder / "trainer.key").exists()
    for name in ("loss", "grad_norm", "reward_mean", "trained_tokens"):
        assert [line[name] for line in steps_of(folder)] == [line[name] for line in steps_of(tmp_path / "started")]
    last = [weights_of_folder(tmp_path / name / "weights" / "v000002") for name in ("started", "listening")]
    assert same(*last)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
