"""Laws 2 and 3: each token enters the loss once, and packing never changes the gradient.

The old policy and the engine's log-probabilities are random, so that ratios leave the clip range on both sides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fixtures.tiny_modules import double_throughout, tiny_module
from tests.property.forests import (
    VOCABULARY,
    DoubleLlama,
    batches_of_rollouts,
    gradients,
    relative_difference,
    with_routes,
)
from upspiral.algorithm.loss import PolicyLoss, SftLoss, TokenTerms
from upspiral.config.models import LoraConfig
from upspiral.trainer.attention import forest_attention_in
from upspiral.trainer.depth_first import lanes_of
from upspiral.trainer.flat import call_rows, flatten, side_by_side
from upspiral.trainer.forest import ForestBatch, Item, pack
from upspiral.trainer.gradients import GradientSums
from upspiral.trainer.logprob import target_logprobs
from upspiral.trainer.lora import factors_behind
from upspiral.trainer.routes import replayed_routes_in
from upspiral.weights.adapter import Adapter
from upspiral.weights.experts import exact_experts_in, expert_layers

LOSS = PolicyLoss(clip_low=0.2, clip_high=0.28, mismatch_cap=2.0)


def hugging_face_llama(dtype: torch.dtype, head_width: int) -> nn.Module:
    """In float32, heads of 16 go through the compiled attention, and all of a layer with heads of 32 is compiled."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_width,
        tie_word_embeddings=True,
    )
    made: Any = LlamaForCausalLM(config)
    return made.to(dtype)


def double_llama() -> nn.Module:
    torch.manual_seed(0)
    return DoubleLlama()


def old_policy(batch: ForestBatch, like: Tensor) -> Tensor:
    """Some log p_old within a factor of 2 of q: a function of the token alone, so that every packing agrees on it."""
    mixed = (batch.targets_M * 7919 + (batch.behavior_logprobs_M * 1e4).astype("int64") * 104729) % 1000
    return torch.from_numpy(batch.behavior_logprobs_M + (mixed / 1000 - 0.5) * 1.4).to(like)


def policy_loss(batch: ForestBatch, logprobs: Tensor) -> Tensor:
    behavior, positive, negative, weight = (
        torch.from_numpy(x).to(logprobs)
        for x in (batch.behavior_logprobs_M, batch.positive_M, batch.negative_M, batch.token_weight_M)
    )
    shift = (old_policy(batch, logprobs) - behavior) / 2
    if not batch.num_targets:
        return logprobs.sum()
    return LOSS(TokenTerms(logprobs, logprobs.detach() + shift, behavior, positive, negative, weight))[0]


def minibatches_of(batches: Sequence[ForestBatch]) -> list[list[ForestBatch]]:
    return [[batch for batch in batches if batch.minibatch == n] for n in sorted({each.minibatch for each in batches})]


def loss_and_gradients(model: nn.Module, batches: Sequence[ForestBatch], **lane: bool) -> tuple[float, list[Tensor]]:
    """The policy loss summed over batches, at a p_theta near p_old so that both sides of the clip occur."""
    model.zero_grad()
    total = 0.0
    with forest_attention_in(model), replayed_routes_in(model), exact_experts_in(model):
        for one in (one for part in minibatches_of(batches) for one in lanes_of(part, **lane)):
            for work in one.remaining:
                batch = one.batches[work.batch]
                if work.kind != "backward":
                    logprobs, _ = target_logprobs(model, batch, temperature=0.7, forest=one.begin(work))
                    loss = policy_loss(batch, logprobs)
                    one.keep_loss(work, loss)
                    total += loss.item()
                if work.kind != "forward":
                    one.end(work)
    return total, gradients(model)


def tiny(family: str) -> nn.Module:
    return tiny_module(family, vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, head_dim=8)


MODELS: list[tuple[str, Callable[[], nn.Module], float]] = [
    ("double throughout", double_llama, 1e-9),
    ("Qwen3 double throughout", lambda: double_throughout(tiny("qwen3")), 1e-9),
    ("Qwen3-MoE double throughout", lambda: double_throughout(tiny("qwen3-moe")), 1e-9),
    ("Qwen3-MoE float32", lambda: tiny("qwen3-moe"), 1e-5),
    ("transformers float64", lambda: hugging_face_llama(torch.float64, 16), 1e-6),
    ("transformers float32", lambda: hugging_face_llama(torch.float32, 16), 1e-5),
    ("compiled float32", lambda: hugging_face_llama(torch.float32, 32), 1e-5),
]


@pytest.mark.parametrize(("model", "tolerance"), [each[1:] for each in MODELS], ids=[each[0] for each in MODELS])
@settings(max_examples=25, deadline=None)
@given(
    items=batches_of_rollouts(),
    budget=st.sampled_from([8, 20, 40, 1000]),
    habits=st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_forest_equals_one_row_per_path(
    model: Callable[[], nn.Module], tolerance: float, items: list[Item], budget: int, habits: list[int]
) -> None:
    made = model()
    items = routed(items, made, habits)
    ours = loss_and_gradients(made, pack(items, tokens_per_microbatch=budget))
    theirs = loss_and_gradients(made, flatten(items))
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance, abs=tolerance)
    assert relative_difference(ours[1], theirs[1]) <= tolerance


def routed(items: list[Item], model: Any, habits: Sequence[int]) -> list[Item]:
    """With routes of the model's shape, where it has experts."""
    layers = expert_layers(model)
    if not layers:
        return items
    router = layers[0].mlp.gate
    return with_routes(items, (len(layers), router.top_k), router.num_experts, habits)


@settings(max_examples=25, deadline=None)
@given(items=batches_of_rollouts(), budget=st.integers(1, 60))
def test_forest_equals_one_row_per_call(items: list[Item], budget: int) -> None:
    model = double_llama()
    ours = loss_and_gradients(model, pack(items, tokens_per_microbatch=budget, lanes=2))
    theirs = loss_and_gradients(model, side_by_side(call_rows(items), tokens_per_microbatch=60))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9, abs=1e-9)
    assert relative_difference(ours[1], theirs[1]) <= 1e-9


@settings(max_examples=40, deadline=None)
@given(items=batches_of_rollouts(), budgets=st.tuples(st.integers(4, 60), st.integers(4, 60)), seed=st.integers(0, 99))
def test_order_and_budget_do_not_change_the_gradient(items: list[Item], budgets: tuple[int, int], seed: int) -> None:
    model, shuffled = double_llama(), random.Random(seed).sample(items, len(items))
    ours = loss_and_gradients(model, pack(items, tokens_per_microbatch=budgets[0]))
    theirs = loss_and_gradients(model, pack(shuffled, tokens_per_microbatch=budgets[1]))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9, abs=1e-9)
    assert relative_difference(ours[1], theirs[1]) <= 1e-9


@pytest.mark.parametrize("model", [each[1] for each in MODELS], ids=[each[0] for each in MODELS])
@settings(max_examples=15, deadline=None)
@given(items=batches_of_rollouts(), budget=st.integers(1, 60), exact=st.booleans())
def test_layers_computed_again_give_the_same_bits(
    model: Callable[[], nn.Module], items: list[Item], budget: int, exact: bool
) -> None:
    made = model()
    batches = pack(routed(items, made, [1, 2, 0, 1]), tokens_per_microbatch=budget, lanes=2)
    kept = loss_and_gradients(made, batches, exact=exact)
    again = loss_and_gradients(made, batches, exact=exact, recompute=True)
    assert again[0] == kept[0]
    assert all(torch.equal(a, b) for a, b in zip(again[1], kept[1], strict=True))


# Without experts: merged or not, a router may choose otherwise.
DENSE = [each for each in MODELS if "MoE" not in each[0]]


@pytest.mark.parametrize(("model", "tolerance"), [each[1:] for each in DENSE], ids=[each[0] for each in DENSE])
@settings(max_examples=15, deadline=None)
@given(items=batches_of_rollouts(), budget=st.integers(1, 60), rank=st.integers(1, 5), alpha=st.floats(0.5, 8))
def test_factors_get_the_gradients_that_layers_of_peft_give_them(
    model: Callable[[], nn.Module], tolerance: float, items: list[Item], budget: int, rank: int, alpha: float
) -> None:
    made, twin, batches = model(), model(), pack(items, tokens_per_microbatch=budget, lanes=2)
    adapter = Adapter(made, LoraConfig(rank=rank, alpha=alpha))
    for each in adapter.weights:
        nn.init.normal_(each.up_OR, std=0.1)
    adapter.merge()
    sums = GradientSums([factors_behind(made, adapter)])
    with sums.collected([0]):
        ours, others = loss_and_gradients(made, batches)
    theirs = loss_and_gradients(with_layers_of_peft(twin, adapter), batches)[0]
    assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    assert not any(gradient.any() for gradient in others), "adapted weights must not keep gradients"
    expected: list[Any] = [
        twin.get_submodule(f"{each.name}.lora_{letter}.default").weight for each in adapter.weights for letter in "AB"
    ]
    if batches:
        found = [sums.take(number) for number in range(len(expected))]
        factors = [torch.zeros_like(x) if own is None else own for own, x in zip(found, expected, strict=True)]
        assert relative_difference(factors, [gradient_of(x) for x in expected]) <= tolerance


def with_layers_of_peft(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The model with PEFT's own layers around its weights, which stay unmerged."""
    config = adapter.config
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=adapter.target_modules)  # pyright: ignore[reportArgumentType]
    peft.inject_adapter_in_model(settings, model)
    for each in adapter.weights:
        for letter, factor in (("A", each.down_RI), ("B", each.up_OR)):
            layer: Any = model.get_submodule(f"{each.name}.lora_{letter}.default")
            layer.weight.data = factor.to(layer.weight.dtype)
    return model.eval()


def gradient_of(parameter: Any) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@settings(max_examples=100, deadline=None)
@given(items=batches_of_rollouts(), budget=st.integers(4, 60))
def test_each_credited_token_is_a_target_once_and_each_context_is_its_path(items: list[Item], budget: int) -> None:
    wanted = sorted(
        (graph.rollout_id, tuple(graph.path_ids(node.id)[: start + position + 1].tolist()), credit.token_weight)
        for graph, credit in items
        if credit.masked is None
        for node in graph.nodes
        for start in [len(graph.path_ids(node.id)) - len(node.token_ids)]
        for position in node.sampled.nonzero()[0]
    )
    batches = pack(items, tokens_per_microbatch=budget)
    found = sorted(each for batch in batches for each in targets_with_context(batch, batches))
    assert found == wanted
    assert all(batch.num_tokens <= budget for batch in batches)
    whole = pack(items, tokens_per_microbatch=10_000)
    assert sum(batch.num_tokens for batch in batches) == sum(batch.num_tokens for batch in whole)


def targets_with_context(
    batch: ForestBatch, batches: Sequence[ForestBatch]
) -> list[tuple[str, tuple[int, ...], float]]:
    """For each target: its rollout, all tokens up to and with it, its weight; from the node table and the context."""
    found = []
    above = [token for run in batch.context for token in batches[run.batch].token_ids_T[run.start : run.end].tolist()]
    for index, source in enumerate(batch.sources_M.tolist()):
        node = int((batch.node_start_N <= source).sum()) - 1
        context, end = [int(batch.targets_M[index])], source + 1
        while node >= 0:
            start = int(batch.node_start_N[node])
            context = batch.token_ids_T[start:end].tolist() + context
            if batch.node_parent_N[node] < 0:
                context = above[: int(batch.positions_T[start])] + context
            node = int(batch.node_parent_N[node])
            end = int(batch.node_start_N[node] + batch.node_length_N[node]) if node >= 0 else 0
        assert int(batch.positions_T[source]) == len(context) - 2
        owner = batch.rollout_ids[batch.rollout_M[index]]
        found.append((owner, tuple(context), float(batch.token_weight_M[index])))
    return found


@settings(max_examples=60, deadline=None)
@given(items=batches_of_rollouts())
def test_a_whole_forest_holds_each_unsampled_prefix_once(items: list[Item]) -> None:
    batches = pack(items, tokens_per_microbatch=10_000)
    assert len(batches) <= 1
    for batch in batches:
        roots = batch.node_start_N[batch.node_parent_N == -1]
        first_tokens = batch.token_ids_T[roots].tolist()
        assert len(first_tokens) == len(set(first_tokens))
        lone = [parent for parent in batch.node_parent_N.tolist() if parent >= 0]
        assert all(lone.count(parent) > 1 for parent in lone), "a node with one child should have been joined with it"


@settings(max_examples=60, deadline=None)
@given(leaves=st.lists(st.floats(-2, 2), min_size=1, max_size=6), drift=st.floats(-1, 1), mismatch=st.floats(-2, 2))
def test_two_sums_suffice_for_the_clip(leaves: list[float], drift: float, mismatch: float) -> None:
    def loss(positive: list[float], negative: list[float]) -> tuple[float, float]:
        count = len(positive)
        logprobs = torch.full((count,), drift, dtype=torch.float64, requires_grad=True)
        old = torch.zeros(count, dtype=torch.float64)
        terms = TokenTerms(
            logprobs, old, old - mismatch, torch.tensor(positive).double(), torch.tensor(negative).double(), old + 1
        )
        value, _ = LOSS(terms)
        value.backward()
        assert logprobs.grad is not None
        return value.item(), logprobs.grad.sum().item()

    apart = loss([max(a, 0.0) for a in leaves], [min(a, 0.0) for a in leaves])
    together = loss([sum(max(a, 0.0) for a in leaves)], [sum(min(a, 0.0) for a in leaves)])
    assert together == pytest.approx(apart, rel=1e-5, abs=1e-6)


def test_sft_is_the_mean_negative_log_likelihood() -> None:
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    ones, zeros = torch.ones(2), torch.zeros(2)
    loss, _ = SftLoss()(TokenTerms(logprobs, zeros, zeros, ones, zeros, ones / 2))
    assert loss.item() == pytest.approx(2.0)
