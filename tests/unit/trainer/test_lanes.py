"""Microbatches side by side: the same step as one after the other, and the same bits every time."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fixtures.demonstrations import demonstration_graph
from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.trainer.forest import pack
from upspiral.trainer.lanes import Lanes
from upspiral.trainer.local import LocalTrainer
from upspiral.weights.cpu import use_threads


def tiny_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    model.to(dtype)  # pyright: ignore[reportArgumentType]
    return model


def train(lanes: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    graphs = [demonstration_graph(str(i), [([1, 2, 3 + i], [9, 8, 7, i] * 15)]) for i in range(12)]
    items = list(zip(graphs, sft_credit(graphs), strict=True))
    batches = pack(items, tokens_per_microbatch=150, lanes=lanes)
    assert {batch.lane for batch in batches} == set(range(lanes)) and len(batches) > lanes
    model = tiny_model(dtype)
    trainer = LocalTrainer(model, TrainerConfig(lr=1e-2), AlgorithmConfig(), temperature=1.0, lanes=lanes)
    for _ in range(2):
        trainer.step(batches, kind="sft")
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("lanes", [2, 3])
def test_lanes_do_not_change_the_step(lanes: int) -> None:
    for alone, together in zip(train(1), train(lanes), strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_a_lane_that_is_left_alone_goes_on_with_what_it_began() -> None:
    """Lane 1 has a batch open, with others below it, when lane 0 has nothing left."""
    graphs = [demonstration_graph("short", [([1, 2], [3, 4])]), demonstration_graph("long", [([5] * 60, [6, 7] * 40)])]
    short, long = ([item] for item in zip(graphs, sft_credit(graphs), strict=True))
    dealt = [
        replace(batch, lane=lane)
        for lane, items in enumerate([short, long])
        for batch in pack(items, tokens_per_microbatch=40)
    ]
    assert [batch.lane for batch in dealt].count(1) > 2 and any(batch.context for batch in dealt)
    made = []
    for lanes, batches in ((2, dealt), (1, dealt), (1, pack([*short, *long], tokens_per_microbatch=1000))):
        model = tiny_model()
        trainer = LocalTrainer(model, TrainerConfig(lr=1e-2), AlgorithmConfig(), temperature=1.0, lanes=lanes)
        trainer.step(batches, kind="sft")
        made.append(list(model.parameters()))
    for one, other in ((made[0], made[2]), (made[1], made[2])):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_lanes_are_reproducible_bit_for_bit() -> None:
    for first, second in zip(train(2, torch.bfloat16), train(2, torch.bfloat16), strict=True):
        assert torch.equal(first, second)


def test_a_lane_shares_weights_and_not_gradients() -> None:
    model = tiny_model()
    lanes = Lanes(model, 2)
    for own, other in zip(*(each.parameters() for each in lanes.models), strict=True):
        assert own.data_ptr() == other.data_ptr() and own is not other
    lanes.models[1](torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_lane_that_fails_says_so() -> None:
    lanes = Lanes(tiny_model(), 2)

    def work(model: object, item: int) -> int:
        if item == 1:
            raise ValueError("lane 1")
        return item

    with pytest.raises(ValueError, match="lane 1"):
        lanes.run(work, [0, 1])


def test_threads_are_a_threads_own() -> None:
    before = torch.get_num_threads()
    lanes = Lanes(tiny_model(), 2)
    assert lanes.run(lambda model, item: torch.get_num_threads(), [0, 1]) == [1, 1]
    assert torch.get_num_threads() == before
    use_threads(before)
