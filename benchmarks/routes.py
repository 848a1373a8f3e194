"""How far engine and trainer are apart on a mixture of experts, with its routes replayed and without.

    python benchmarks/routes.py [--save]

A random Qwen3-MoE (12 layers, 32 experts, 4 a token, hidden width 256) in bfloat16: the fast engine samples 32 answers
of 64 tokens to 4 prompts of 150, and the trainer computes their log-probabilities, once as the batch says where tokens
go and once as its own routers choose. `choices` is the share of tokens and layers where these took other experts than
the engine did, `tokens` the share of tokens with at least one of those; differences are of log-probabilities, absolute.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from result import report
from upspiral.config.models import EngineConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.trainer.attention import ForestPass, forest_attention_in
from upspiral.trainer.forest import ForestBatch, Item, pack
from upspiral.trainer.logprob import target_logprobs
from upspiral.trainer.routes import replayed_routes_in
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import UNKNOWN_EXPERT, NodeCredit, RolloutCredit, SamplingParams
from upspiral.weights.experts import expert_layers
from upspiral.weights.load import LoadedModel

VOCABULARY = 4000


def model() -> LoadedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 128, "norm_topk_prob": True, "initializer_range": 0.05, "tie_word_embeddings": True,
    }  # fmt: skip
    made: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    return LoadedModel.from_module(made.to(torch.bfloat16))


async def sample(loaded: LoadedModel) -> list[Item]:
    engine = EmbeddedEngine(loaded, EngineConfig(context_length=256, routes="replay"), seed=0)
    await engine.start()
    try:
        return list(await asyncio.gather(*(one_rollout(engine, number) for number in range(32))))
    finally:
        await engine.stop()


async def one_rollout(engine: EmbeddedEngine, number: int) -> Item:
    random = Random(number % 4)
    prompt = [random.randrange(VOCABULARY) for _ in range(150)]
    ids, logprobs, routes = [], [], list[NDArray[np.int16]]()
    async for chunk in engine.generate(prompt, SamplingParams(max_tokens=64)):
        ids += chunk.token_ids
        logprobs += chunk.logprobs
        routes += [each for each in (chunk.prompt_routes, chunk.routes) if each is not None]
    before_the_first = np.full_like(routes[0][:1], UNKNOWN_EXPERT)
    graph = TrajectoryGraph(f"r{number}")
    run = TokenRun.answer(prompt, ids, logprobs, [0] * len(ids), "length", np.concatenate([before_the_first, *routes]))
    node = graph.add(None, run, role="assistant", reason="root")
    return graph, RolloutCredit(graph.rollout_id, "g", (NodeCredit(node.id, 1.0, 0.0),), 1.0)


def differences(loaded: LoadedModel, batch: ForestBatch) -> tuple[dict[str, float], NDArray[np.int64]]:
    """Of log-probabilities from the engine's, and [T, L, K] where the tokens went, sorted by expert."""
    taken: list[torch.Tensor] = []
    with forest_attention_in(loaded.module), replayed_routes_in(loaded.module), torch.no_grad():
        routers = [layer.mlp.gate for layer in expert_layers(loaded.module)]
        hooks = [router.register_forward_hook(lambda *seen: taken.append(seen[2][2])) for router in routers]
        logprobs, _ = target_logprobs(loaded.module, batch, temperature=1.0, forest=ForestPass(batch))
        for hook in hooks:
            hook.remove()
    found = np.abs(logprobs.numpy() - batch.behavior_logprobs_M)
    return {"mean": float(found.mean()), "max": float(found.max())}, torch.stack(taken, 1).sort(-1).values.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    loaded = model()
    [batch] = pack(asyncio.run(sample(loaded)), tokens_per_microbatch=100_000)
    replayed, engine_took = differences(loaded, batch)
    free, trainer_took = differences(loaded, replace(batch, routes_TLK=batch.routes_TLK[:, :0]))
    other = (engine_took != trainer_took).any(-1)
    figures = {
        "sampled_tokens": batch.num_targets,
        "other": {"choices": round(float(other.mean()), 4), "tokens": round(float(other.any(-1).mean()), 4)},
        "free": {name: round(value, 5) for name, value in free.items()},
        "replayed": {name: round(value, 5) for name, value in replayed.items()},
    }
    report("routes", figures, {"replayed_mean_over_free_mean_at_most": 0.5}, save=arguments.save)


if __name__ == "__main__":
    main()
