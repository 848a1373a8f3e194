"""A run whose trainer is two processes learns what it learns in one, also when it is stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import recipe, steps_of
from upspiral.config.loader import load_run_config
from upspiral.loop.run import run_training
from upspiral.monitor.progress import LiveProgress

ON_RANKS = {"trainer.kind": "fsdp", "trainer.parallel.ranks": "2"}


def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")

    def run(name: str, steps: int, overrides: dict[str, str], *, resume: bool = False) -> list[dict]:
        config = load_run_config(recipe(tmp_path, model, steps=steps), overrides)
        run_training(config, tmp_path / name, resume=resume, progress=LiveProgress(name, steps, quiet=True))
        return steps_of(tmp_path / name)

    wanted = run("local", 3, {})
    run("ranks", 2, ON_RANKS)
    found = run("ranks", 3, ON_RANKS, resume=True)
    assert [line["reward_mean"] for line in found] == [line["reward_mean"] for line in wanted]
    assert [line["trained_tokens"] for line in found] == [line["trained_tokens"] for line in wanted]
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in wanted], rel=1e-4)
