"""Exact mode: the engine, with whatever else in its batches, and the trainer, however it cuts the forest, agree on
every bit of every log-probability."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.fixtures.tiny_modules import FAMILIES, VOCABULARY, tiny_module
from upspiral.config.models import AlgorithmConfig, EngineConfig, LoraConfig, TrainerConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.kernel.path_attention import path_attention
from upspiral.trainer.attention import forest_attention_in
from upspiral.trainer.depth_first import lanes_of
from upspiral.trainer.forest import Item, pack
from upspiral.trainer.local import LocalTrainer
from upspiral.trainer.logprob import target_logprobs
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import NodeCredit, RolloutCredit, SamplingParams
from upspiral.weights.exact import exact_attention
from upspiral.weights.experts import exact_experts_in
from upspiral.weights.load import LoadedModel

TEMPERATURE = 0.8


async def sampled_rollouts(engine: EmbeddedEngine, count: int) -> list[Item]:
    """Agents of several turns that share a beginning and go at their own pace."""
    choices = random.Random(0)
    system = [choices.randrange(VOCABULARY) for _ in range(70)]

    async def agent(number: int) -> Item:
        own = random.Random(number)
        graph = TrajectoryGraph(f"r{number}")
        last = graph.add(None, TokenRun.given(system), role="system", reason="root").id
        for turn in range(3):
            told = [own.randrange(VOCABULARY) for _ in range(own.randint(1, 90))]
            last = graph.add(last, TokenRun.given(told), role="user", reason="append").id
            params = SamplingParams(max_tokens=own.randint(1, 20), temperature=TEMPERATURE, seed=100 * number + turn)
            run = await sampled_run(engine, graph.path_ids(last).tolist(), params)
            last = graph.add(last, run, role="assistant", reason="append").id
        nodes = tuple(NodeCredit(node.id, 1.0, 0.0) for node in graph.nodes if node.num_sampled)
        return graph, RolloutCredit(graph.rollout_id, "g", nodes, 1.0)

    return list(await asyncio.gather(*(agent(number) for number in range(count))))


async def sampled_run(engine: EmbeddedEngine, prompt: Sequence[int], params: SamplingParams) -> TokenRun:
    ids, logprobs = [], []
    async for chunk in engine.generate(prompt, params):
        ids += chunk.token_ids
        logprobs += chunk.logprobs
    return TokenRun.answer([], ids, logprobs, [0] * len(ids), "length")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "by torch"])
def test_engine_and_trainer_agree_on_every_bit(
    family: str, dtype: torch.dtype, count: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        for place in ("kernel.layer", "trainer.attention", "engine.embedded.attention"):
            monkeypatch.setattr(f"upspiral.{place}.path_attention", lambda: None)
    elif path_attention() is None:
        pytest.skip("nothing can be compiled here")
    loaded = LoadedModel.from_module(tiny_module(family, dtype, hidden_size=96, num_attention_heads=6, head_dim=32))
    check_agreement(loaded, asyncio.run(sampled_by(loaded, count)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_agree_with_an_adapter_too(family: str, dtype: torch.dtype) -> None:
    loaded = LoadedModel.from_module(tiny_module(family, dtype, hidden_size=96, num_attention_heads=6, head_dim=32))
    config = TrainerConfig(lr=1e-2, lora=LoraConfig(), activation_checkpointing=True)
    trainer = LocalTrainer(loaded.module, config, AlgorithmConfig(), temperature=TEMPERATURE, exact=True)
    before, items = loaded.layers[0].qkv.clone(), asyncio.run(sampled_by(loaded, 2))
    for _ in range(2):
        trainer.step(pack(items, tokens_per_microbatch=200))
    assert not torch.equal(before, loaded.layers[0].qkv), "the step must have changed the policy"
    metrics = trainer.step(pack(asyncio.run(sampled_by(loaded, 3)), tokens_per_microbatch=200))
    assert metrics.tokens["max_mismatch_abs"] == 0.0
    check_agreement(loaded, asyncio.run(sampled_by(loaded, 3)))


async def sampled_by(loaded: LoadedModel, count: int) -> list[Item]:
    config = EngineConfig(context_length=512, max_running=6, cache_slots=8, prefill_tokens=40, exact=True)
    engine = EmbeddedEngine(loaded, config, seed=0)
    await engine.start()
    try:
        return await sampled_rollouts(engine, count)
    finally:
        await engine.stop()


def check_agreement(loaded: LoadedModel, items: list[Item]) -> None:
    for budget, lanes in ((10_000, 1), (100, 1), (300, 2)):
        batches = pack(items, tokens_per_microbatch=budget, lanes=lanes)
        with forest_attention_in(loaded.module), exact_experts_in(loaded.module), torch.no_grad():
            for lane in lanes_of(batches, exact=True):
                for work in lane.remaining:
                    if work.kind == "backward":
                        continue
                    batch = lane.batches[work.batch]
                    logprobs, _ = target_logprobs(
                        loaded.module, batch, temperature=TEMPERATURE, forest=lane.begin(work)
                    )
                    assert np.array_equal(logprobs.numpy(), batch.behavior_logprobs_M.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 300, 32, dtype=dtype), torch.randn(2, 300, 32, dtype=dtype)
    queries = torch.randn(2, 40, 32, dtype=dtype)
    seen = torch.randint(1, 300, (2, 40))
    together, lse = exact_attention(queries, keys, values, seen, 0.2)
    for row in (0, 7, 39):
        longest = int(seen[:, row].max())
        alone, alone_lse = exact_attention(
            queries[:, row : row + 1], keys[:, :longest], values[:, :longest], seen[:, row : row + 1], 0.2
        )
        assert torch.equal(alone[:, 0], together[:, row]) and torch.equal(alone_lse[:, 0], lse[:, row])
    mask = torch.arange(300) >= seen[..., None]
    scores = (queries.float() @ keys.float().mT * 0.2).masked_fill(mask, float("-inf"))
    torch.testing.assert_close(together, scores.softmax(-1) @ values.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
