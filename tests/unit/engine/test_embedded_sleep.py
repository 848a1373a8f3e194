"""An embedded engine gives its memory up while a trainer computes, and has it again with the new weights."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

torch = pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.completion import Completion
from tests.fixtures.publications import shared_root
from tests.fixtures.publishing_trainer import PublishingTrainer
from tests.fixtures.tiny_modules import VOCABULARY
from upspiral.config.models import EngineConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.errors import EngineError, StaleBaseError
from upspiral.types import SamplingParams
from upspiral.weights.cpu import give_back_freed_memory, keep_freed_memory
from upspiral.weights.load import load_model
from upspiral.weights.publication import PublisherSettings

SIZES = {"max_running": 8, "cache_slots": 12, "context_length": 512, "prefill_tokens": 64}
PROMPT = [5, 9, 100, 31, 7, 7, 2]


@pytest.fixture
def root() -> Iterator[Path]:
    with shared_root() as root:
        yield root


class Trainer(PublishingTrainer):
    def __init__(self, family: str, root: Path, **config: Any) -> None:
        super().__init__(family, root / "model", **config)
        self.settings = PublisherSettings(root / "published")


@asynccontextmanager
async def running(trainer: Trainer, **changes: Any) -> AsyncIterator[EmbeddedEngine]:
    """With weights that the engine has read from the trainer's folder."""
    own = load_model(trainer.folder, dtype="float32", device="cpu")
    engine = EmbeddedEngine(own, EngineConfig.model_validate({**SIZES, **changes}), seed=0)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def complete(
    engine: EmbeddedEngine, prompt: list[int], max_tokens: int = 20, into: Completion | None = None
) -> Completion:
    into = into or Completion()
    async for chunk in engine.generate(prompt, SamplingParams(max_tokens=max_tokens, seed=len(prompt))):
        into.ids += chunk.token_ids
        into.logprobs += chunk.logprobs
        into.versions += chunk.versions
    return into


def prompts(count: int, length: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(count)
    return [torch.randint(3, VOCABULARY, (length + each,), generator=random).tolist() for each in range(count)]


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 100))


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_weights_packed_copies_and_cache_are_given_back_to_the_system(root: Path) -> None:
    keep_freed_memory()  # as a run does, so that freeing alone gives nothing back
    # Much to hold, in blocks that glibc would keep, and little to compute.
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128}
    trainer = Trainer("llama", root, num_hidden_layers=8, intermediate_size=8192, **heads)
    weights = sum(each.nbytes for each in trainer.module.parameters())

    async def main() -> None:
        async with running(trainer, cache_slots=16) as engine:
            await engine.update_weights(trainer.publish(1))
            await complete(engine, prompts(1, 490)[0], 1)
            expected = weights + sum(each._weight.nbytes for each in engine._forward._projections if each._packs)
            cache = engine._cache.keys_values
            expected += int(engine.stats().extra["held_tokens"]) * cache[0, 0, :, 0].nbytes * len(cache)
            del cache
            give_back_freed_memory()
            before = resident_bytes()
            await engine.sleep()
            freed = before - resident_bytes()
            assert expected > 120e6
            assert freed > 0.9 * expected, f"{freed / 1e6:.0f} MB of {expected / 1e6:.0f} MB"
            await engine.update_weights(trainer.publish(2))
            assert (await complete(engine, PROMPT)).versions == [2] * 20

    run(main())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3-moe"])
def test_what_has_slept_samples_the_same_bits(family: str, exact: bool, root: Path) -> None:
    trainer = Trainer(family, root)
    several = prompts(6, 40)

    async def sampled(engine: EmbeddedEngine) -> list[Completion]:
        return [await complete(engine, each) for each in several]

    async def main() -> None:
        async with running(trainer, exact=exact) as awake, running(trainer, exact=exact) as slept:
            for version, form in enumerate(("full", "full", "delta", "delta"), 1):
                trainer.change()
                trainer.settings = PublisherSettings(trainer.settings.root, form)
                publication = trainer.publish(version)
                await slept.sleep()
                await asyncio.gather(awake.update_weights(publication), slept.update_weights(publication))
                assert await sampled(slept) == await sampled(awake)
            counts = slept.stats().extra
            assert counts["held_tokens"] == awake.stats().extra["held_tokens"]
            assert counts["held_tokens"] == sum(
                sign * counts[f"{name}_tokens"]
                for name, sign in (("computed", 1), ("copied", 1), ("evicted", -1), ("outdated", -1), ("lost", -1))
            )

    run(main())


def test_what_is_under_way_goes_on_by_the_new_weights_and_nothing_is_sampled_in_between(root: Path) -> None:
    trainer = Trainer("llama", root)

    async def main() -> None:
        async with running(trainer) as engine:
            await engine.update_weights(trainer.publish(1))
            under_way = Completion()
            task = asyncio.create_task(complete(engine, PROMPT, 200, under_way))
            while len(under_way.ids) < 10:
                await asyncio.sleep(0.002)
            await engine.sleep()
            await engine.sleep()  # does nothing
            await asyncio.sleep(0.02)  # what was sampled before arrives
            count = len(under_way.ids)
            late = asyncio.create_task(complete(engine, PROMPT))
            trainer.change()
            await asyncio.sleep(0.1)
            assert len(under_way.ids) == count < 200
            await engine.update_weights(trainer.publish(2))
            await task
            assert under_way.versions == [1] * count + [2] * (200 - count)
            expected = trainer.logprobs([*PROMPT, *under_way.ids], 200 - count)
            assert abs(expected - under_way.logprobs[count:]).max() < 1e-4, "its prefix is computed again"
            assert (await late).versions == [2] * 20

    run(main())


def test_it_sleeps_on_until_it_has_whole_weights(root: Path) -> None:
    trainer = Trainer("llama", root)

    async def main() -> None:
        async with running(trainer) as engine:
            trainer.settings = PublisherSettings(trainer.settings.root, "delta")
            await engine.update_weights(trainer.publish(1))  # which is whole
            await engine.sleep()
            trainer.change()
            stale = trainer.publish(2)
            for folder in trainer.settings.root.iterdir():
                if folder != stale.folder:
                    folder.rename(root / "gone")
            waiting = asyncio.create_task(complete(engine, PROMPT))
            with pytest.raises(StaleBaseError):
                await engine.update_weights(stale)
            await asyncio.sleep(0.05)
            assert not waiting.done()
            trainer.settings = PublisherSettings(trainer.settings.root)
            await engine.update_weights(trainer.publish(2))
            assert (await waiting).versions == [2] * 20

    run(main())


def test_the_version_from_before_wakes_it_too(root: Path) -> None:
    trainer = Trainer("llama", root)

    async def main() -> None:
        async with running(trainer) as engine:
            publication = trainer.publish(1)
            await engine.update_weights(publication)
            before = await complete(engine, PROMPT)
            await engine.sleep()
            await engine.update_weights(publication)
            assert await complete(engine, PROMPT) == before

    run(main())


def test_who_waits_is_told_when_it_is_stopped_asleep(root: Path) -> None:
    trainer = Trainer("llama", root)

    async def main() -> None:
        async with running(trainer) as engine:
            await engine.sleep()
            waiting = asyncio.create_task(complete(engine, PROMPT))
            await asyncio.sleep(0.01)
            await engine.stop()
            with pytest.raises(EngineError, match="was stopped"):
                await waiting

    run(main())
