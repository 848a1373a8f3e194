"""Routes on their whole way: from the engine through the gateway into the store, and from there into the trainer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch

from tests.fixtures.tiny_model import make_tokenizer
from tests.fixtures.tiny_modules import own_routes, tiny_module
from upspiral.config.models import EngineConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.gateway.metrics import GatewayMetrics
from upspiral.gateway.request import AnswerRequest, SessionPolicy
from upspiral.gateway.session import Room, Session
from upspiral.rendering.renderer import Renderer
from upspiral.trainer.attention import forest_attention_in
from upspiral.trainer.depth_first import lanes_of
from upspiral.trainer.forest import Item, pack
from upspiral.trainer.logprob import target_logprobs
from upspiral.trainer.routes import replayed_routes_in
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import UNKNOWN_EXPERT, Message, NodeCredit, Rollout, RolloutCredit
from upspiral.weights.load import LoadedModel


async def converse(model: LoadedModel, folder: Path, rollouts: int, turns: int) -> list[Item]:
    """Rollouts that ask the same first, one after the other, each answered twice at every turn; read back from the
    store."""
    renderer = Renderer.from_folder(make_tokenizer(folder / "model"))
    config = EngineConfig(context_length=512, max_running=4, cache_slots=4, prefill_tokens=50, routes="replay")
    engine = EmbeddedEngine(model, config, seed=0)
    store = TrajectoryStore(folder / "trajectories.db")
    await engine.start()
    try:
        for number in range(rollouts):
            rollout = Rollout(f"r{number}", "task", "group")
            store.create_rollout(rollout)
            room = Room(renderer, engine, store, GatewayMetrics())
            session = Session(room, rollout, SessionPolicy(max_completion_tokens=8))
            messages = [Message("user", "How many lines of logs/app.log contain ERROR?")]
            for turn in range(turns):
                call = session.begin(AnswerRequest(tuple(messages), answers=2))
                async for _ in call.events():
                    pass
                messages += [call.plan.generations[turn % 2].answer().message, Message("user", f"{number} and {turn}?")]
            await session.seal()
        return [(store.graph(f"r{number}"), _credit(store, f"r{number}")) for number in range(rollouts)]
    finally:
        await engine.stop()
        store.close()


def _credit(store: TrajectoryStore, rollout_id: str) -> RolloutCredit:
    sampled = [node.id for node in store.graph(rollout_id).nodes if node.num_sampled]
    return RolloutCredit(rollout_id, "group", tuple(NodeCredit(each, 1.0, 0.0) for each in sampled), 1.0)


def test_each_token_arrives_with_the_experts_that_computed_it(tmp_path: Path) -> None:
    model = LoadedModel.from_module(tiny_module("qwen3-moe", vocab_size=700))
    items = asyncio.run(asyncio.wait_for(converse(model, tmp_path, rollouts=2, turns=3), 60))
    for graph, _ in items:
        assert sum(node.num_sampled > 0 for node in graph.nodes) == 6
        for leaf in graph.leaves():
            stored: Any = [graph.routes(node.id) for node in graph.path(leaf.id)]
            found, wanted = np.concatenate(stored), own_routes(model.module, graph.path_ids(leaf.id).tolist())
            assert np.array_equal(found[:-1], wanted[:-1])
            assert (found[-1] == UNKNOWN_EXPERT).all()
    batches = pack(items, tokens_per_microbatch=60)
    flat = sum(graph.length(leaf.id) for graph, _ in items for leaf in graph.leaves())
    assert sum(batch.num_tokens for batch in batches) < flat / 2
    assert all((batch.routes_TLK != UNKNOWN_EXPERT).all() for batch in batches)
    with forest_attention_in(model.module), replayed_routes_in(model.module), torch.no_grad():
        for lane in lanes_of(batches):
            for work in lane.remaining:
                if work.kind != "backward":
                    batch, forest = lane.batches[work.batch], lane.begin(work)
                    logprobs, _ = target_logprobs(model.module, batch, temperature=1.0, forest=forest)
                    np.testing.assert_allclose(logprobs.numpy(), batch.behavior_logprobs_M, atol=1e-4)
