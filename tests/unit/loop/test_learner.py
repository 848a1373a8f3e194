"""A learner whose engine has weights of its own, and memory of its own or not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.tiny_model import make_model
from tests.unit.trainer.test_rounding import batches
from upspiral.config.models import AlgorithmConfig, EngineConfig, TrainerConfig
from upspiral.engine.base import UNPUBLISHED_VERSION
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.errors import TrainerError
from upspiral.loop.learner import PublishingLearner
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.local import LocalTrainer
from upspiral.types import SamplingParams
from upspiral.weights.load import load_model
from upspiral.weights.publication import PublisherSettings


class WatchedTrainer(LocalTrainer):
    """Calls `at_step` when a step begins and when it ends, and `at_rest`."""

    at_step: Callable[[], None] = staticmethod(lambda: None)
    at_rest: Callable[[], None] = staticmethod(lambda: None)

    def step(self, *args: Any, **keywords: Any) -> Any:
        self.at_step()
        try:
            return super().step(*args, **keywords)
        finally:
            self.at_step()

    def rest(self) -> None:
        super().rest()
        self.at_rest()


@dataclass
class Parts:
    trainer: WatchedTrainer
    engine: EmbeddedEngine
    learner: PublishingLearner
    trained: Any
    own: Any
    """The modules of trainer and engine."""

    async def sampled(self) -> tuple[list[int], list[float], set[int]]:
        params, tokens = SamplingParams(max_tokens=20, temperature=0.0), list[int]()
        logprobs, versions = list[float](), set[int]()
        async for chunk in self.engine.generate([5, 6, 7], params):
            tokens += chunk.token_ids
            logprobs += chunk.logprobs
            versions |= set(chunk.versions)
        return tokens, logprobs, versions

    @property
    def cache_bytes(self) -> int:
        return self.engine._cache.keys_values.nbytes

    @property
    def weight_bytes(self) -> int:
        return sum(each.untyped_storage().nbytes() for each in self.own.parameters())


@asynccontextmanager
async def parts(root: Path, *, colocated: bool = False) -> AsyncIterator[Parts]:
    folder = make_model(root / "model")
    setup = TrainerSetup(folder, "float32", "cpu", TrainerConfig(), AlgorithmConfig(), temperature=1.0)
    trained, own = (load_model(folder, dtype="float32", device="cpu") for _ in range(2))
    trainer = WatchedTrainer.of(trained.module, setup, lanes=1, exact=False)
    assert isinstance(trainer, WatchedTrainer)
    engine = EmbeddedEngine(own, EngineConfig(context_length=64, cache_slots=64), seed=0)
    engine.publish(UNPUBLISHED_VERSION)
    settings = PublisherSettings(root / f"weights-{colocated}")
    learner = PublishingLearner(trainer, engine, settings, threads=1, colocated=colocated)
    await engine.start()
    try:
        yield Parts(trainer, engine, learner, trained.module, own.module)
    finally:
        await learner.close()
        await engine.stop()


def test_what_a_warm_start_changed_is_published_as_version_0(tmp_path: Path) -> None:
    async def check() -> None:
        async with parts(tmp_path) as made:
            for _ in range(3):
                await made.learner.step(batches(), version=None, kind="sft", lr=0.05)
            assert made.engine.version == UNPUBLISHED_VERSION, "nobody samples before the warm start is over"
            await made.learner.publish(0)
            assert made.engine.version == 0
            ours = dict(made.own.named_parameters())
            assert all((ours[name] == value).all() for name, value in made.trained.named_parameters())
            assert (await made.sampled())[2] == {0}

    before = threading.enumerate()
    asyncio.run(asyncio.wait_for(check(), 60))
    for thread in set(threading.enumerate()) - set(before):
        if thread.name.startswith("trainer_"):
            thread.join(10)
            assert not thread.is_alive(), "the trainer's thread outlives its learner"


def test_a_colocated_engine_has_no_memory_while_the_trainer_computes_and_samples_the_same_bits(tmp_path: Path) -> None:
    async def check() -> None:
        async with parts(tmp_path) as apart, parts(tmp_path, colocated=True) as colocated:
            held: list[tuple[int, int]] = []
            rested: list[int] = []
            colocated.trainer.at_step = lambda: held.append((colocated.cache_bytes, colocated.weight_bytes))
            colocated.trainer.at_rest = lambda: rested.append(colocated.cache_bytes)
            awake = colocated.cache_bytes, colocated.weight_bytes
            for made in (apart, colocated):  # a warm start
                for _ in range(2):
                    await made.learner.step(batches(), version=None, kind="sft", lr=0.05)
            assert (colocated.cache_bytes, colocated.weight_bytes) == (0, 0), "it sleeps on between the steps"
            for made in (apart, colocated):
                await made.learner.publish(0)
            for version in (1, 2):
                assert await colocated.sampled() == await apart.sampled()
                assert (colocated.cache_bytes, colocated.weight_bytes) == awake
                for made in (apart, colocated):
                    await made.learner.step(batches(), version=version, kind="sft", lr=0.05)
            last = await colocated.sampled()
            assert last == await apart.sampled() and last[2] == {2}
            assert held == [(0, 0)] * 8
            assert rested == [0] * 3, "the trainer's memory is free before the engine takes its own"

    asyncio.run(asyncio.wait_for(check(), 60))


def test_a_step_that_fails_leaves_it_asleep_and_a_checkpoint_wakes_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with parts(tmp_path, colocated=True) as made:
            await made.learner.publish(0)
            before = await made.sampled()
            await made.learner.save(tmp_path / "checkpoints", 0, keep=1)

            def fail() -> None:
                raise TrainerError("a rank is gone")

            made.trainer.at_step = fail
            with pytest.raises(TrainerError):
                await made.learner.step(batches(), version=1, kind="sft")
            assert made.cache_bytes == 0
            (checkpoint,) = (tmp_path / "checkpoints").iterdir()
            await made.learner.load(checkpoint, version=0)
            assert await made.sampled() == before

    asyncio.run(asyncio.wait_for(check(), 60))
