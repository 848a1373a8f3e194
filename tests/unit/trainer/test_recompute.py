"""Activation checkpointing: less memory, the same bits; that random forests keep theirs is in tests/property."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fixtures.demonstrations import demonstration_graph
from tests.fixtures.memory import peak_bytes
from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.local import LocalTrainer
from upspiral.weights.load import LoadedModel

LAYERS = 8
HEAD_WIDTHS = [8, 32]
"""Computed by transformers' modules, and by the compiled decoder where there is one."""


def batches(budget: int, lanes: int = 1) -> list[ForestBatch]:
    graphs = [demonstration_graph(str(i), [([1, 2, 3] * 30, [9, 8, 7, i] * 20)]) for i in range(6)]
    return pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=budget, lanes=lanes)


def trainer(
    activation_checkpointing: bool, head_width: int, *, lanes: int = 1, exact: bool = False, inner_width: int = 64
) -> tuple[Any, LocalTrainer]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=inner_width, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_width, tie_word_embeddings=True,
    )  # fmt: skip
    made: Any = LlamaForCausalLM(config)
    model = LoadedModel.from_module(made.bfloat16()).module
    settings = TrainerConfig(lr=1e-2, activation_checkpointing=activation_checkpointing)
    return model, LocalTrainer(model, settings, AlgorithmConfig(), temperature=1.0, lanes=lanes, exact=exact)


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_it_takes_less_memory(head_width: int) -> None:
    """What is alive at the peak is one layer instead of all of them, and every layer's input."""
    forest = batches(1000)
    peaks = {}
    for checkpointing in (False, True):
        _, learner = trainer(checkpointing, head_width)
        learner.gradients(forest, "sft")
        peaks[checkpointing] = peak_bytes(lambda learner=learner: learner.gradients(forest, "sft"))
    assert peaks[True] < peaks[False] / 3, peaks


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
@pytest.mark.parametrize(("lanes", "exact"), [(1, False), (2, False), (1, True)])
def test_steps_keep_their_bits(lanes: int, exact: bool, head_width: int) -> None:
    forest = batches(100, lanes)
    assert any(batch.context for batch in forest), "the forest must be cut"
    ends = []
    for checkpointing in (False, True):
        model, learner = trainer(checkpointing, head_width, lanes=lanes, exact=exact)
        for _ in range(3):
            learner.step(forest, kind="sft")
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_outside_of_a_step_the_model_is_as_it_came() -> None:
    model, learner = trainer(True, 8)
    learner.step(batches(100), kind="sft")
    assert all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("head_width", HEAD_WIDTHS)
def test_a_long_rollout_in_parts_takes_less_memory_than_whole(head_width: int) -> None:
    """Three parts have all that their gradients need; of those above, layers are computed again."""
    graph = demonstration_graph("long", [([1, 2, 3] * 10, [9, 8, 7] * 10)] * 20)
    peaks = []
    for budget in (2000, 100):
        forest = pack([(graph, sft_credit([graph])[0])], tokens_per_microbatch=budget)
        _, learner = trainer(False, head_width, inner_width=512)
        learner.gradients(forest, "sft")
        peaks.append(peak_bytes(lambda learner=learner, forest=forest: learner.gradients(forest, "sft")))
    assert peaks[1] < 0.6 * peaks[0], peaks
