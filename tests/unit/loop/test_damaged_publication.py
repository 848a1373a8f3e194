"""Differences that are damaged on their way: the engine gets the version whole, once, and the run goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

torch = pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.publishing_trainer import PublishingTrainer
from tests.fixtures.vllm_contract import ContractServer, NumberTrainer, serving
from upspiral.config.models import EngineConfig
from upspiral.engine.base import UpdatableEngine
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.engine.served.client import RemoteEngine
from upspiral.engine.served.server import EngineServer
from upspiral.engine.vllm.client import VllmEngine
from upspiral.errors import EngineError
from upspiral.loop.learner import PublishingLearner
from upspiral.trainer.base import TrainerBackend
from upspiral.types import SamplingParams
from upspiral.weights.load import load_model
from upspiral.weights.publication import Publication, PublisherSettings

DEADLINE_S = 60


class Damaging:
    """A trainer whose publications are hit by something before an engine reads them."""

    def __init__(self, trainer: Any, *, file: str, also_whole: bool = False) -> None:
        """`file`: of a publication, which one is hit; of whole ones only with `also_whole`."""
        self._trainer, self._file, self._also_whole = trainer, file, also_whole
        self.published: list[Publication] = []

    def publish(self, settings: PublisherSettings, version: int) -> Publication:
        made = self._trainer(settings, version)
        self.published.append(made)
        if version > 1 and (made.base is not None or self._also_whole):
            for path in made.folder.glob(self._file):
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 64
                path.write_bytes(bytes(data))
        return made

    def close(self) -> None:
        """There is nothing to end."""

    @property
    def bases(self) -> list[tuple[int, int | None]]:
        return [(each.version, each.base) for each in self.published]


@asynccontextmanager
async def learner_of(trainer: Damaging, engine: UpdatableEngine, root: Path) -> AsyncIterator[PublishingLearner]:
    settings = PublisherSettings(root / "published", form="delta")
    learner = PublishingLearner(cast(TrainerBackend, trainer), engine, settings, threads=1)
    try:
        yield learner
    finally:
        await learner.close()


def run(check: Any) -> None:
    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


async def logprobs(engine: Any) -> set[tuple[float, int]]:
    return {
        row
        async for chunk in engine.generate([5, 17, 9], SamplingParams(max_tokens=4))
        for row in zip(chunk.logprobs, chunk.versions, strict=True)
    }


@asynccontextmanager
async def vllm() -> AsyncIterator[tuple[ContractServer, VllmEngine]]:
    server = ContractServer()
    async with serving(server) as url:
        engine = VllmEngine(url)
        await engine.start()
        try:
            yield server, engine
        finally:
            await engine.stop()


@pytest.mark.parametrize("file", ["changes.bin", "manifest.json", "probe.json"])
def test_a_damaged_difference_is_followed_by_the_whole_on_vllm(file: str, tmp_path: Path) -> None:
    async def check() -> None:
        numbers = NumberTrainer(tmp_path)
        trainer = Damaging(lambda settings, version: numbers.publish(version, 10.0 * version, settings), file=file)
        async with vllm() as (_, engine), learner_of(trainer, engine, tmp_path) as learner:
            for version in (1, 2, 3):
                await learner.publish(version)
                assert await logprobs(engine) == {(-10.0 * version, version)}
        assert trainer.bases == [(1, None), (2, 1), (2, None), (3, 2), (3, None)]

    run(check)


def test_a_difference_that_the_probe_does_not_find_again_is_followed_by_the_whole(tmp_path: Path) -> None:
    """As when a loader takes whole weights and mistakes a few."""

    async def check() -> None:
        numbers = NumberTrainer(tmp_path)
        trainer = Damaging(lambda settings, version: numbers.publish(version, 10.0 * version, settings), file="none")
        async with vllm() as (server, engine), learner_of(trainer, engine, tmp_path) as learner:
            await learner.publish(1)
            server.mistakes_differences = True
            await learner.publish(2)
            assert await logprobs(engine) == {(-20.0, 2)}
            server.keeps_old_weights = True
            with pytest.raises(EngineError, match="as if it had not adopted version 3"):
                await learner.publish(3)
            with pytest.raises(EngineError, match="version 3"):
                await logprobs(engine)
        assert trainer.bases == [(1, None), (2, 1), (2, None), (3, 2), (3, None)], "whole once, and no more"

    run(check)


@pytest.mark.parametrize("is_served", [False, True])
def test_a_damaged_difference_is_followed_by_the_whole_on_our_own_engine(is_served: bool, tmp_path: Path) -> None:
    async def check() -> None:
        source = PublishingTrainer("llama", tmp_path / "model")

        def publish(settings: PublisherSettings, version: int) -> Publication:
            source.settings = settings
            source.change()
            return source.publish(version)

        trainer, own = Damaging(publish, file="changes.bin"), load_model(source.folder, dtype="float32", device="cpu")
        embedded = EmbeddedEngine(own, EngineConfig(context_length=64, cache_slots=64), seed=0)
        async with served(embedded) if is_served else started(embedded) as engine:
            async with learner_of(trainer, engine, tmp_path) as learner:
                for version in (1, 2):
                    await learner.publish(version)
                    assert engine.version == version
                    wanted = dict(source.module.named_parameters())
                    assert all(torch.equal(wanted[name], value) for name, value in own.module.named_parameters())
            whole_too = Damaging(publish, file="*.[bs]*[ns]", also_whole=True)
            async with learner_of(whole_too, engine, tmp_path) as learner:
                with pytest.raises(EngineError, match="not what was written"):
                    await learner.publish(3)
            assert engine.version == 2 and {version for _, version in await logprobs(engine)} == {2}
        assert trainer.bases == [(1, None), (2, 1), (2, None)]

    run(check)


@asynccontextmanager
async def started(engine: EmbeddedEngine) -> AsyncIterator[UpdatableEngine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@asynccontextmanager
async def served(engine: EmbeddedEngine) -> AsyncIterator[UpdatableEngine]:
    async with started(engine) as own:
        server = EngineServer(own, "k")
        client = RemoteEngine("127.0.0.1", await server.start("127.0.0.1"), "k")
        try:
            await client.start()
            yield client
        finally:
            await client.stop()
            await server.stop()
