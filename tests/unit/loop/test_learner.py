"""A learner whose engine has weights of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.tiny_model import make_model
from tests.unit.trainer.test_rounding import batches
from upspiral.config.models import AlgorithmConfig, EngineConfig, TrainerConfig
from upspiral.engine.base import UNPUBLISHED_VERSION
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.loop.learner import PublishingLearner
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.local import LocalTrainer
from upspiral.types import SamplingParams
from upspiral.weights.load import load_model
from upspiral.weights.publication import PublisherSettings


def test_what_a_warm_start_changed_is_published_as_version_0(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    setup = TrainerSetup(folder, "float32", "cpu", TrainerConfig(), AlgorithmConfig(), temperature=1.0)
    trained, own = (load_model(folder, dtype="float32", device="cpu") for _ in range(2))
    trainer = LocalTrainer.of(trained.module, setup, lanes=1, exact=False)
    engine = EmbeddedEngine(own, EngineConfig(context_length=64, cache_slots=64), seed=0)
    engine.publish(UNPUBLISHED_VERSION)
    learner = PublishingLearner(trainer, engine, PublisherSettings(tmp_path / "weights"), threads=1)

    async def sampled() -> tuple[list[int], set[int]]:
        params, tokens, versions = SamplingParams(max_tokens=20, temperature=0.0), list[int](), set[int]()
        async for chunk in engine.generate([5, 6, 7], params):
            tokens += chunk.token_ids
            versions |= set(chunk.versions)
        return tokens, versions

    async def check() -> None:
        await engine.start()
        try:
            for _ in range(3):
                await learner.step(batches(), version=None, kind="sft", lr=0.05)
            assert engine.version == UNPUBLISHED_VERSION, "nobody samples before the warm start is over"
            await learner.publish(0)
            assert engine.version == 0
            ours = dict(own.module.named_parameters())
            assert all((ours[name] == value).all() for name, value in trained.module.named_parameters())
            assert (await sampled())[1] == {0}
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(check(), 60))
