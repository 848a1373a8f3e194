"""Forest attention through FlexAttention on a GPU against the flat form on the CPU, which shares no code with it."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch

from tests.fixtures.tiny_modules import VOCABULARY, tiny_module
from tests.property.forests import relative_difference
from tests.property.test_forest_laws import loss_and_gradients
from upspiral.trainer.attention import ForestPass, forest_attention
from upspiral.trainer.flat import flatten
from upspiral.trainer.forest import Item, pack
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import NodeCredit, RolloutCredit

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """torch compiles a function for a limited number of shapes and dtypes in a process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def agents(count: int, shared: int, turns: int, longest: int) -> list[Item]:
    """Agents that share a beginning and go on with turns of their own, half of which fork."""
    chance, items = Random(0), []

    def ids(most: int) -> list[int]:
        return [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, most))]

    beginning = [chance.randrange(VOCABULARY) for _ in range(shared)]
    for number in range(count):
        graph = TrajectoryGraph(f"r{number}")
        last = graph.add(None, TokenRun.given(beginning), role="system", reason="root").id
        for turn in range(turns):
            told = graph.add(last, TokenRun.given(ids(longest)), role="user", reason="append").id
            sampled = ids(longest)
            run = TokenRun.answer([], sampled, [-1.5] * len(sampled), [0] * len(sampled), "stop")
            answer = graph.add(told, run, role="assistant", reason="append").id
            last = last if turn % 2 else answer
        nodes = tuple(
            NodeCredit(node.id, chance.random(), -chance.random()) for node in graph.nodes if node.num_sampled
        )
        items.append((graph, RolloutCredit(graph.rollout_id, "g", nodes, 0.01)))
    return items


def on_gpu(dtype: torch.dtype) -> Any:
    model: Any = tiny_module("qwen3", dtype, head_dim=32)
    return model.to("cuda")


@pytest.mark.parametrize("budget", [300, 2000, 100_000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
def test_gradients_are_those_of_the_flat_form(dtype: torch.dtype, tolerance: float, budget: int) -> None:
    items = agents(count=3, shared=400, turns=4, longest=180)
    our_loss, ours = loss_and_gradients(on_gpu(dtype), pack(items, tokens_per_microbatch=budget))
    loss, theirs = loss_and_gradients(tiny_module("qwen3", head_dim=32), flatten(items))
    assert our_loss == pytest.approx(loss, rel=tolerance)
    assert relative_difference([x.float().cpu() for x in ours], theirs) <= tolerance


def test_layers_computed_again_take_the_same_way() -> None:
    items = agents(count=2, shared=300, turns=3, longest=150)
    model, batches = on_gpu(torch.float32), pack(items, tokens_per_microbatch=400)
    kept, again = (loss_and_gradients(model, batches, recompute=recompute) for recompute in (False, True))
    assert again[0] == pytest.approx(kept[0], rel=1e-6)
    assert relative_difference(again[1], kept[1]) <= 1e-5


def test_32k_tokens_fit_without_a_mask_of_tokens_by_tokens() -> None:
    [batch] = pack(agents(count=16, shared=16_384, turns=4, longest=256), tokens_per_microbatch=1 << 20)
    assert batch.num_tokens > 24_000
    heads = (16, 8, 8)
    query, key, value = (
        torch.randn(1, count, batch.num_tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in heads
    )
    forest = ForestPass(batch)

    def attend() -> None:
        mixed, _ = forest_attention(_Layer, query, key, value, forest=forest)
        mixed.backward(torch.ones_like(mixed))

    attend()  # compiles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend()
    mask_bytes = batch.num_tokens**2
    assert torch.cuda.max_memory_allocated() - before < mask_bytes
    assert query.grad is not None and query.grad.isfinite().all()


class _Layer:
    layer_idx = 0
