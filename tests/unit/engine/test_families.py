"""The embedded engine computes every family as transformers does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.fixtures.tiny_modules import FAMILIES, VOCABULARY, own_routes, tiny_module
from upspiral.config.models import EngineConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.errors import ConfigError
from upspiral.types import SamplingParams
from upspiral.weights.load import LoadedModel


def prompt(length: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


async def completion(
    engine: EmbeddedEngine, ids: Sequence[int], params: SamplingParams
) -> tuple[list[int], list[float]]:
    sampled, logprobs = [], []
    async for chunk in engine.generate(ids, params):
        sampled += chunk.token_ids
        logprobs += chunk.logprobs
    return sampled, logprobs


def completions(
    model: LoadedModel, prompts: Sequence[Sequence[int]], temperature: float, exact: bool = False
) -> list[tuple[list[int], list[float]]]:
    """All prompts at once, in chunks of at most 60 tokens."""

    async def main() -> list[tuple[list[int], list[float]]]:
        config = EngineConfig(max_running=8, cache_slots=16, context_length=256, prefill_tokens=60, exact=exact)
        engine = EmbeddedEngine(model, config, seed=0)
        await engine.start()
        try:
            params = SamplingParams(max_tokens=20, temperature=temperature)
            return await asyncio.gather(*(completion(engine, each, params) for each in prompts))
        finally:
            await engine.stop()

    return asyncio.run(asyncio.wait_for(main(), 60))


def assert_as_transformers(model: LoadedModel, ids: Sequence[int], sampled: list[int], logprobs: list[float]) -> None:
    with torch.no_grad():
        logits = model.module(torch.tensor([[*ids, *sampled]])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(sampled)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_logprobs_of_a_mixed_batch_are_those_of_transformers(family: str, exact: bool) -> None:
    model = LoadedModel.from_module(tiny_module(family))
    shared = prompt(90)
    prompts = [prompt(1), prompt(17), prompt(130), *([*shared, index] for index in range(4))]
    for ids, found in zip(prompts, completions(model, prompts, 1.0, exact), strict=True):
        assert_as_transformers(model, ids, *found)


async def routes_of(engine: EmbeddedEngine, ids: Sequence[int]) -> tuple[list[int], NDArray[np.int16]]:
    """The tokens of prompt and completion, and which experts computed each of them but the last."""
    sampled, routes = [], []
    async for chunk in engine.generate(ids, SamplingParams(max_tokens=15)):
        sampled += chunk.token_ids
        assert (chunk.prompt_routes is None) == (len(sampled) > 1) and chunk.routes is not None
        routes += [chunk.routes] if chunk.prompt_routes is None else [chunk.prompt_routes, chunk.routes]
    return [*ids, *sampled], np.concatenate(routes)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_the_engine_says_which_experts_computed_each_token(exact: bool) -> None:
    model = LoadedModel.from_module(tiny_module("qwen3-moe"))
    shared = prompt(90)

    async def main() -> list[tuple[list[int], NDArray[np.int16]]]:
        config = EngineConfig(
            max_running=3, cache_slots=4, context_length=256, prefill_tokens=60, exact=exact, routes="replay"
        )
        engine = EmbeddedEngine(model, config, seed=0)
        await engine.start()
        try:
            first = [prompt(1), prompt(130), *([*shared, index] for index in range(4))]
            found = await asyncio.gather(*(routes_of(engine, each) for each in first))
            continued = [[*tokens, 3, 4, 5] for tokens, _ in found]
            return [*found, *(await asyncio.gather(*(routes_of(engine, each) for each in continued)))]
        finally:
            assert engine.stats().reused_tokens > 300
            await engine.stop()

    for tokens, routes in asyncio.run(asyncio.wait_for(main(), 60)):
        assert np.array_equal(routes, own_routes(model.module, tokens[:-1]))


def test_a_model_without_experts_has_no_routes_to_replay() -> None:
    with pytest.raises(ConfigError, match=r'engine\.routes = "replay", but the model has no experts'):
        EmbeddedEngine(
            LoadedModel.from_module(tiny_module("qwen3")), EngineConfig(context_length=64, routes="replay"), seed=0
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_in_place_shows_in_the_next_token(family: str) -> None:
    model = LoadedModel.from_module(tiny_module(family))
    before = completions(model, [prompt(50)], 0.0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.check_fused()
    [(sampled, logprobs)] = completions(model, [prompt(50)], 0.0)
    assert (sampled, logprobs) != before[0]
    assert_as_transformers(model, prompt(50), sampled, logprobs)
