"""Whatever comes, in whatever order, and whoever leaves early: reuse never changes a log-probability."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from upspiral.config.models import EngineConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.types import SamplingParams
from upspiral.weights.load import LoadedModel

VOCABULARY, CONTEXT = 60, 192


@dataclass(frozen=True)
class Arrival:
    """A prompt is the first `shared` tokens of a trunk and then `own` tokens of its own."""

    trunk: int
    shared: int
    own: int
    seed: int
    max_tokens: int
    leaves_after: int | None
    turns: int


ARRIVALS = st.builds(
    Arrival,
    trunk=st.integers(0, 1),
    shared=st.sampled_from([0, 5, 20, 60, 90]),
    own=st.integers(1, 20),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 16),
    leaves_after=st.none() | st.integers(0, 8),
    turns=st.integers(1, 3),
)


@cache
def _model() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    return LoadedModel.from_module(LlamaForCausalLM(config))


def _ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _check(prompt: list[int], ids: list[int], logprobs: list[float]) -> None:
    with torch.no_grad():
        logits = _model().module(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)


async def _turn(engine: EmbeddedEngine, prompt: list[int], arrival: Arrival) -> list[int]:
    ids: list[int] = []
    logprobs: list[float] = []
    stream = engine.generate(prompt, SamplingParams(max_tokens=arrival.max_tokens))
    async for chunk in stream:
        ids += chunk.token_ids
        logprobs += chunk.logprobs
        if arrival.leaves_after is not None and len(ids) > arrival.leaves_after:
            await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
            break
    _check(prompt, ids, logprobs)
    return ids


async def _rollout(engine: EmbeddedEngine, arrival: Arrival) -> None:
    prompt = _ids(90, arrival.trunk)[: arrival.shared] + _ids(arrival.own, 10 + arrival.seed)
    for _ in range(arrival.turns):
        prompt = prompt + await _turn(engine, prompt, arrival) + _ids(5, arrival.seed)


@settings(max_examples=25, deadline=None)
@given(arrivals=st.lists(ARRIVALS, min_size=1, max_size=12), running=st.integers(1, 5), spare=st.integers(0, 4))
def test_reuse_never_changes_a_logprob(arrivals: list[Arrival], running: int, spare: int) -> None:
    config = EngineConfig(max_running=running, cache_slots=running + spare, context_length=CONTEXT, prefill_tokens=32)

    async def main() -> None:
        engine = EmbeddedEngine(_model(), config, seed=0)
        await engine.start()
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*(_rollout(engine, arrival) for arrival in arrivals))
                while engine.stats().running + engine.stats().waiting:
                    await asyncio.sleep(0.002)
        finally:
            await engine.stop()

    asyncio.run(main())
