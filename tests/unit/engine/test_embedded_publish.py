"""Weights change under generations: what carries which version, and which weights computed it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.fixtures.tiny_modules import tiny_module
from upspiral.config.models import EngineConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.types import SamplingParams
from upspiral.weights.load import LoadedModel

VOCABULARY = 120


@pytest.fixture
def model() -> LoadedModel:
    # Heads of 32, so that the compiled layers compute it where there are some.
    module = tiny_module("llama", vocab_size=VOCABULARY, head_dim=32, max_position_embeddings=512)
    return LoadedModel.from_module(module)


@dataclass
class Completion:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


async def _complete(engine: EmbeddedEngine, prompt: list[int], max_tokens: int, into: Completion) -> Completion:
    async for chunk in engine.generate(prompt, SamplingParams(max_tokens=max_tokens)):
        into.ids += chunk.token_ids
        into.logprobs += chunk.logprobs
        into.versions += chunk.versions
    return into


@asynccontextmanager
async def _running(model: LoadedModel, **changes: Any) -> AsyncIterator[EmbeddedEngine]:
    sizes = {"max_running": 8, "cache_slots": 12, "context_length": 512, "prefill_tokens": 64}
    engine = EmbeddedEngine(model, EngineConfig.model_validate({**sizes, **changes}), seed=0)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def _run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.002)


def _prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _change(model: LoadedModel) -> None:
    generator = torch.Generator().manual_seed(9)
    for parameter in model.module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def _distance(model: LoadedModel, prompt: list[int], completion: Completion, version: int) -> float:
    """Largest difference between the log-probabilities of tokens of a version and those of the weights of now."""
    with torch.no_grad():
        logits = model.module(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
    chosen = torch.tensor(completion.versions) == version
    return float((expected - torch.tensor(completion.logprobs))[chosen].abs().max())


@pytest.mark.parametrize("recompute", [False, True])
def test_versions_change_exactly_at_the_publication(model: LoadedModel, recompute: bool) -> None:
    prompts = [_prompt(70), _prompt(70), _prompt(30, seed=1)]

    async def main() -> list[Completion]:
        async with _running(model) as engine:
            completions = [Completion() for _ in prompts]
            tasks = [
                asyncio.create_task(_complete(engine, *each))
                for each in zip(prompts, [200] * 3, completions, strict=True)
            ]
            await _until(lambda: min(len(completion.ids) for completion in completions) > 10)
            async with engine.paused():
                await asyncio.sleep(0.02)  # what was sampled before the pause arrives
                before = [len(completion.ids) for completion in completions]
                assert sum(before) == engine.stats().sampled_tokens
                _change(model)
                engine.publish(1, recompute=recompute)
            await asyncio.gather(*tasks)
            for count, completion in zip(before, completions, strict=True):
                assert completion.versions == [0] * count + [1] * (200 - count)
            stats = engine.stats()
            every = sum(len(prompt) for prompt in prompts) + stats.extra["recomputed_tokens"]
            assert stats.prefilled_tokens + stats.reused_tokens == every
            assert (stats.extra["recomputed_tokens"] > 0) == recompute
            return completions

    for prompt, completion in zip(prompts, _run(main()), strict=True):
        # Kept keys and values make tokens that are neither of the old weights nor of the new.
        assert (_distance(model, prompt, completion, version=1) < 1e-4) == recompute


@pytest.mark.parametrize("recompute", [False, True])
def test_a_publication_during_a_chunked_prefill(model: LoadedModel, recompute: bool) -> None:
    prompt = _prompt(400)

    async def main() -> Completion:
        async with _running(model, prefill_tokens=4) as engine:

            def publish_when_halfway() -> bool:
                if halfway := 0 < engine.stats().prefilled_tokens < 400:
                    _change(model)
                    engine.publish(1, recompute=recompute)
                return halfway

            completion = Completion()
            task = asyncio.create_task(_complete(engine, prompt, 20, completion))
            while not await engine.exclusive(publish_when_halfway):
                assert engine.stats().prefilled_tokens < 400
            await task
            reused = engine.stats().reused_tokens
            await _complete(engine, prompt, 1, Completion())
            # Keys and values of two versions are nobody's prefix; those computed anew are.
            assert engine.stats().reused_tokens - reused == (399 if recompute else 0)
            return completion

    completion = _run(main())
    assert completion.versions == [1] * 20
    assert (_distance(model, prompt, completion, version=1) < 1e-4) == recompute


def test_a_pause_holds_tokens_back_until_the_last_resume(model: LoadedModel) -> None:
    async def main() -> None:
        async with _running(model) as engine:
            running, late = Completion(), Completion()
            first = asyncio.create_task(_complete(engine, _prompt(20), 150, running))
            await _until(lambda: len(running.ids) > 5)
            await engine.pause()
            await engine.pause()
            engine.resume()
            second = asyncio.create_task(_complete(engine, _prompt(20), 10, late))
            await asyncio.sleep(0.05)
            count = len(running.ids)
            assert await engine.exclusive(lambda: 7) == 7  # the trainer's work need not wait
            await asyncio.sleep(0.05)
            assert (len(running.ids), len(late.ids)) == (count, 0)
            assert count < 150
            engine.resume()
            await asyncio.gather(first, second)
            assert (len(running.ids), len(late.ids)) == (150, 10)

    _run(main())


def test_nothing_is_sampled_between_new_weights_and_their_version(model: LoadedModel) -> None:
    prompt = _prompt(50)

    async def main() -> Completion:
        async with _running(model) as engine:
            completion = Completion()
            task = asyncio.create_task(_complete(engine, prompt, 150, completion))
            await _until(lambda: len(completion.ids) > 5)

            def update() -> None:
                _change(model)
                engine.publish(1, recompute=True)

            await engine.exclusive(update)
            return await task

    completion = _run(main())
    assert 5 < completion.versions.count(0) < 150
    assert _distance(model, prompt, completion, version=1) < 1e-4
