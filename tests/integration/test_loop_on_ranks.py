"""A run whose trainer is two processes learns what it learns in one, also when it is stopped and resumed, with ranks
that divide the model as before or otherwise."""

from __future__ import annotations

import shutil
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
