"""Runs whose engines sleep while the trainer computes learn what others learn, also when an engine dies asleep."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")
pytest.importorskip("ray", reason="needs the [ray] extra")

from tests.fixtures.engine_process import EngineProcess
from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import recipe
from tests.integration.test_ray import learned, sampled
from upspiral.config.loader import load_run_config
from upspiral.engine.base import UpdatableEngine
from upspiral.engine.kept import KeptEngine
from upspiral.engine.router import Router
from upspiral.loop.placement import Placement, Setting, ThisMachine
from upspiral.loop.run import run_training
from upspiral.monitor.progress import LiveProgress
from upspiral.trainer.ranks import Rank

FLAGS = {"engine.exact": "true", "trainer.kind": "fsdp"}


class ServedEngines(ThisMachine):
    """A place with two engine processes, of which the first is killed in the trainer's second step."""

    def __init__(self) -> None:
        self._homes: list[EngineProcess] = []

    async def engine(self, setting: Setting) -> UpdatableEngine:
        router = Router([KeptEngine(lambda number=number: self._home(setting, number)) for number in range(2)])
        setting.stack.push_async_callback(router.stop)
        await router.start()
        return router

    async def ranks(self, count: int, setting: Setting) -> Sequence[Rank]:
        return [KillingRank(rank, self._homes[0]) for rank in await super().ranks(count, setting)]

    def _home(self, setting: Setting, number: int) -> EngineProcess:
        home = EngineProcess(setting.config, setting.model_folder, setting.folder / f"engine-{number}.log")
        self._homes.append(home)
        return home


class KillingRank:
    """Before its second step, it kills an engine's process."""

    def __init__(self, rank: Rank, victim: EngineProcess) -> None:
        self._rank, self._victim, self._steps = rank, victim, 0

    def call(self, method: str, *args: Any, **keywords: Any) -> Future[Any]:
        self._steps += method == "step"
        if method == "step" and self._steps == 2:
            assert self._victim._process is not None
            self._victim._process.kill()
        return self._rank.call(method, *args, **keywords)

    def kill(self) -> None:
        self._rank.kill()


@pytest.mark.timeout(300)
def test_the_same_results_as_with_an_engine_that_never_sleeps(tmp_path: Path) -> None:
    file = recipe(tmp_path, make_model(tmp_path / "model"), steps=2)

    def run(name: str, flags: dict[str, str], placement: Placement | None) -> Path:
        config = load_run_config(file, FLAGS | flags)
        progress = LiveProgress(name, 2, quiet=True)
        run_training(config, tmp_path / name, resume=False, progress=progress, placement=placement)
        return tmp_path / name

    apart = run("apart", {}, None)
    colocated = run("colocated", {"engine.colocated": "true"}, ServedEngines())
    assert len(sampled(apart)) >= 2 * 32 and sampled(colocated) == sampled(apart)
    assert learned(colocated) == learned(apart)
    steps = ["sleep", "v0", "sleep", "v1", "sleep", "v2"]
    assert (colocated / "engine-1.log").read_text().split() == steps
    # Killed asleep, it was not started before it was woken, which nobody waits for, as there is the other one.
    killed = (colocated / "engine-0.log").read_text().split()
    assert killed[:5] == steps[:5] and set(killed[5:]) <= {"v2"}
