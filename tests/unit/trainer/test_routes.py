"""Replayed routes: tokens go where they are told to, and the router still learns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.fixtures.demonstrations import demonstration_graph
from tests.fixtures.tiny_modules import own_routes, tiny_module
from upspiral.algorithm.sft import sft_credit
from upspiral.trainer.attention import forest_attention_in
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.logprob import target_logprobs
from upspiral.trainer.routes import replayed_routes_in
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import UNKNOWN_EXPERT
from upspiral.weights.experts import expert_layers

PROMPT, ANSWER = [5, 6, 7, 8, 9], [10, 11, 12]
SHAPE = (2, 3)
"""Of the tiny model: two of its three layers have experts, and a token goes to three."""


def batch_with(routes: NDArray[np.int16] | None) -> ForestBatch:
    """One rollout. `routes`: of its tokens but the last, which predicts nothing."""
    graph = demonstration_graph("a", [(PROMPT, ANSWER)])
    [batch] = pack([(graph, sft_credit([graph])[0])], tokens_per_microbatch=100)
    return batch if routes is None else replace(batch, routes_TLK=routes)


def logprobs_of(model: Any, batch: ForestBatch) -> torch.Tensor:
    with ExitStack() as stack:
        stack.enter_context(forest_attention_in(model))
        stack.enter_context(replayed_routes_in(model))
        return target_logprobs(model, batch, temperature=1.0)[0]


def known_routes(model: Any) -> NDArray[np.int16]:
    return own_routes(model, [*PROMPT, *ANSWER[:-1]])


def test_the_models_own_routes_and_unknown_ones_change_nothing() -> None:
    model = tiny_module("qwen3-moe")
    free = logprobs_of(model, batch_with(None))
    routes = known_routes(model)
    assert routes.shape == (7, *SHAPE)
    torch.testing.assert_close(logprobs_of(model, batch_with(routes)), free, rtol=0, atol=0)
    routes[::2] = UNKNOWN_EXPERT
    torch.testing.assert_close(logprobs_of(model, batch_with(routes)), free, rtol=0, atol=0)


def test_tokens_go_where_they_are_told_and_the_router_learns_from_it() -> None:
    model: Any = tiny_module("qwen3-moe")
    routes = np.broadcast_to(np.array([[7, 0, 2], [1, 5, 4]], np.int16), (7, *SHAPE)).copy()
    told, free = logprobs_of(model, batch_with(routes)), logprobs_of(model, batch_with(None))
    assert not torch.allclose(told, free)
    told.sum().backward()
    for layer, experts in zip(expert_layers(model), ([0, 2, 7], [1, 4, 5]), strict=True):
        used = layer.mlp.experts.down_proj.grad.abs().sum((1, 2)).nonzero()[:, 0].tolist()
        assert used == experts
        assert layer.mlp.gate.weight.grad.abs().sum() > 0


def test_another_order_of_the_same_experts_is_the_same_to_rounding() -> None:
    model = tiny_module("qwen3-moe")
    turned = known_routes(model)[:, :, ::-1].copy()
    free = logprobs_of(model, batch_with(None))
    torch.testing.assert_close(logprobs_of(model, batch_with(turned)), free, rtol=1e-5, atol=1e-5)


def test_after_the_trainer_the_model_routes_for_itself_again() -> None:
    model: Any = tiny_module("qwen3-moe")
    before = model(torch.tensor([PROMPT])).logits
    logprobs_of(model, batch_with(np.zeros((7, *SHAPE), np.int16)))
    torch.testing.assert_close(model(torch.tensor([PROMPT])).logits, before, rtol=0, atol=0)


def routed(name: str, expert: int) -> TrajectoryGraph:
    """The rollout, with all tokens of its prompt sent to one expert, and those of the answer to expert 1."""
    graph = TrajectoryGraph(name)
    for node in demonstration_graph(name, [(PROMPT, ANSWER)]).nodes:
        rows = np.where(np.concatenate([[False], node.sampled[:-1]]), 1, expert)
        routes = np.broadcast_to(rows[:, None, None], (len(rows), 1, 1)).astype(np.int16)
        graph.append(replace(node, routes=routes))
    return graph


@pytest.mark.parametrize(("experts", "tokens"), [((3, 3), 5 + 2 * 2), ((3, 4), 2 * (5 + 2))])
def test_prompts_that_were_routed_differently_are_not_merged(experts: Sequence[int], tokens: int) -> None:
    graphs = [routed(str(index), expert) for index, expert in enumerate(experts)]
    [batch] = pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=100)
    assert batch.num_tokens == tokens
    prompts = batch.routes_TLK[np.isin(batch.token_ids_T, PROMPT), 0, 0]
    assert sorted({*prompts.tolist()}) == sorted({*experts})
    assert {*batch.routes_TLK[np.isin(batch.token_ids_T, ANSWER), 0, 0].tolist()} == {1}


def test_a_token_that_nothing_followed_has_unknown_routes() -> None:
    graph = routed("a", 3)
    last = graph.routes(graph.next_id - 1)
    assert last is not None and last[-1].tolist() == [[UNKNOWN_EXPERT]]
