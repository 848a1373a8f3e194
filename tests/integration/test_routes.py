"""Routes on their whole way: from the engine through the gateway into the store, and from there into the trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch
from numpy.typing import NDArray

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
from upspiral.trainer.forest import ForestBatch, Item, pack
from upspiral.trainer.logprob import target_logprobs
from upspiral.trainer.routes import replayed_routes_in
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import UNKNOWN_EXPERT, Message, NodeCredit, Rollout, RolloutCredit
from upspiral.weights.experts import exact_experts_in
from upspiral.weights.load import LoadedModel


async def converse(model: LoadedModel, folder: Path, *, exact: bool = False) -> list[Item]:
    """Two rollouts that ask the same first, one after the other, answered twice at each of three turns; read back from
    the store."""
    renderer = Renderer.from_folder(make_tokenizer(folder / "model"))
    config = EngineConfig(
        context_length=512, max_running=4, cache_slots=4, prefill_tokens=50, exact=exact, routes="replay"
    )
    engine = EmbeddedEngine(model, config, seed=0)
    store = TrajectoryStore(folder / "trajectories.db")
    await engine.start()
    try:
        for number in range(2):
            rollout = Rollout(f"r{number}", "task", "group")
            store.create_rollout(rollout)
            room = Room(renderer, engine, store, GatewayMetrics())
            session = Session(room, rollout, SessionPolicy(max_completion_tokens=8))
            messages = [Message("user", "How many lines of logs/app.log contain ERROR?")]
            for turn in range(3):
                call = session.begin(AnswerRequest(tuple(messages), answers=2))
                async for _ in call.events():
                    pass
                messages += [call.plan.generations[turn % 2].answer().message, Message("user", f"{number} and {turn}?")]
            await session.seal()
        return [(store.graph(f"r{number}"), _credit(store, f"r{number}")) for number in range(2)]
    finally:
        await engine.stop()
        store.close()


def _credit(store: TrajectoryStore, rollout_id: str) -> RolloutCredit:
    sampled = [node.id for node in store.graph(rollout_id).nodes if node.num_sampled]
    return RolloutCredit(rollout_id, "group", tuple(NodeCredit(each, 1.0, 0.0) for each in sampled), 1.0)


def sampled_items(model: LoadedModel, folder: Path, *, exact: bool = False) -> list[Item]:
    return asyncio.run(asyncio.wait_for(converse(model, folder, exact=exact), 60))


def differences(model: LoadedModel, batches: Sequence[ForestBatch], *, exact: bool = False) -> NDArray[np.float64]:
    """[M] of the trainer's log-probabilities from the engine's."""
    found = []
    with ExitStack() as stack:
        stack.enter_context(forest_attention_in(model.module))
        stack.enter_context(replayed_routes_in(model.module))
        if exact:
            stack.enter_context(exact_experts_in(model.module))
        stack.enter_context(torch.no_grad())
        for lane in lanes_of(batches, exact=exact):
            for work in lane.remaining:
                if work.kind != "backward":
                    batch, forest = lane.batches[work.batch], lane.begin(work)
                    logprobs, _ = target_logprobs(model.module, batch, temperature=1.0, forest=forest)
                    found.append(np.abs(logprobs.numpy() - batch.behavior_logprobs_M))
    return np.concatenate(found)


def test_each_token_arrives_with_the_experts_that_computed_it(tmp_path: Path) -> None:
    model = LoadedModel.from_module(tiny_module("qwen3-moe", vocab_size=700))
    items = sampled_items(model, tmp_path)
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
    assert differences(model, batches).max() < 1e-4


def test_where_the_trainer_rounds_otherwise_replay_keeps_it_close_to_the_engine(tmp_path: Path) -> None:
    size = {"num_hidden_layers": 8, "mlp_only_layers": [], "num_experts": 32, "initializer_range": 0.1}
    model = LoadedModel.from_module(tiny_module("qwen3-moe", torch.bfloat16, vocab_size=700, **size))
    [batch] = pack(sampled_items(model, tmp_path), tokens_per_microbatch=10_000)
    free = replace(batch, routes_TLK=batch.routes_TLK[:, :0])
    assert differences(model, [batch]).mean() < differences(model, [free]).mean() / 2


def test_exact_mode_is_exact_on_replayed_routes(tmp_path: Path) -> None:
    model = LoadedModel.from_module(tiny_module("qwen3-moe", torch.bfloat16, vocab_size=700))
    batches = pack(sampled_items(model, tmp_path, exact=True), tokens_per_microbatch=60)
    assert all(batch.routes_TLK.size for batch in batches)
    assert differences(model, batches, exact=True).max() == 0
