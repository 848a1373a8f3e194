"""AdamW without masters: right on average, nothing lost, the same bits every time, and 4 bytes a weight less."""

from __future__ import annotations

import io
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fixtures.demonstrations import demonstration_graph
from tests.fixtures.memory import peak_bytes
from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.errors import ModelError, StoreError
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.gradients import GradientSums
from upspiral.trainer.local import LocalTrainer
from upspiral.trainer.optimizer import MasterAdamW
from upspiral.trainer.rounding import RoundingAdamW, round_at_random


def config(**changes: Any) -> TrainerConfig:
    return TrainerConfig(**{"lr": 1e-2, "master_weights": "none", **changes})


def batches() -> list[ForestBatch]:
    graphs = [demonstration_graph(str(i), [([1, 2, 3 + i], [9, 8, 7, i])]) for i in range(4)]
    return pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=20)


def learner(width: int = 32, layers: int = 2, seed: int = 0, **changes: Any) -> tuple[Any, LocalTrainer]:
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    model = model.bfloat16()
    torch.manual_seed(seed)
    return model, LocalTrainer(model, config(**changes), AlgorithmConfig(), temperature=1.0)


def weights(of: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in of.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sums_of(gradient: Tensor) -> GradientSums:
    sums = GradientSums()
    sums.add(0, gradient)
    return sums


def distance_of_neighbours(values: Tensor) -> Tensor:
    """A unit in the last place of bfloat16 (8 significant bits) at each value."""
    return torch.ldexp(torch.ones_like(values), values.abs().frexp().exponent - 8)


def test_rounding_is_right_on_average_and_to_a_neighbour() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(500) * 10.0 ** torch.randint(-6, 6, (500,)), torch.tensor([0.0, -1.0, 0.5])])
    generator, draws, total = torch.Generator().manual_seed(1), 4000, torch.zeros(len(values), dtype=torch.float64)
    target, unit = torch.empty_like(values, dtype=torch.bfloat16), distance_of_neighbours(values)
    for _ in range(draws):
        round_at_random(values.clone(), target, generator)
        assert ((target.float() - values).abs() < unit).all()
        total += target.double()
    error = (total / draws - values).abs() / unit
    assert error.max() < 5 * 0.5 / draws**0.5
    assert error[-3:].max() == 0, "what bfloat16 holds must stay"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_expected_update_is_that_of_masters(weight_decay: float) -> None:
    """Three steps, a thousand times: the mean lies where float32 masters go."""
    torch.manual_seed(0)
    start, gradients = torch.randn(40, 50).bfloat16(), [torch.randn(40, 50).bfloat16() for _ in range(3)]
    settings = config(weight_decay=weight_decay)

    def ended(kind: Any, dtype: torch.dtype) -> Tensor:
        parameter = start.to(dtype, copy=True).requires_grad_()
        optimizer = kind([parameter], settings)
        for gradient in gradients:
            optimizer.step(sums_of(gradient.to(dtype)), 1e-3)
        return parameter.detach().float()

    exact, mean, runs = ended(MasterAdamW, torch.float32), torch.zeros(40, 50, dtype=torch.float64), 1000
    for seed in range(runs):
        torch.manual_seed(seed)
        mean += ended(RoundingAdamW, torch.bfloat16).double() / runs
    unit = distance_of_neighbours(torch.maximum(exact.abs(), start.float().abs()))
    noise = 0.5 * 3**0.5 / runs**0.5
    error = (mean - exact) / unit
    assert error.abs().max() < 5.5 * noise
    assert error.mean().abs() < 5 * noise / error.numel() ** 0.5, "no side may be preferred"
    assert (exact - start.float()).abs().max() > 1e-3


def test_a_large_weight_is_updated_in_all_its_blocks() -> None:
    count = (1 << 22) + 5
    parameter = torch.ones(count, dtype=torch.bfloat16).requires_grad_()
    optimizer = RoundingAdamW([parameter], config())
    optimizer.step(sums_of(torch.ones_like(parameter)), 0.25)
    assert torch.equal(parameter.detach(), torch.full_like(parameter, 0.75))


def test_updates_below_the_precision_are_not_lost() -> None:
    model, trainer = learner()
    norm, before = model.model.norm.weight, weights(model)
    for _ in range(60):  # each moves a weight of 1.0 by 1e-4; a bfloat16 step there is 4e-3
        trainer.step(batches(), kind="sft", lr=1e-4)
    assert not torch.equal(norm, torch.ones_like(norm))
    moved = sum(((a - b).abs().sum().item() for a, b in zip(weights(model), before, strict=True)), 0.0)
    masters, twin = learner(master_weights="float32")
    for _ in range(60):
        twin.step(batches(), kind="sft", lr=1e-4)
    expected = sum(((a - b).abs().sum().item() for a, b in zip(weights(masters), before, strict=True)), 0.0)
    assert moved == pytest.approx(expected, rel=0.3)


def test_supervised_loss_falls() -> None:
    _, trainer = learner()
    losses = [trainer.step(batches(), kind="sft").loss for _ in range(40)]
    assert losses[-1] < losses[0] / 4


def test_the_seed_alone_decides() -> None:
    ends = []
    for seed in (0, 0, 1):
        model, trainer = learner(seed=seed)
        for _ in range(3):
            trainer.step(batches(), kind="sft")
        ends.append(weights(model))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped() -> None:
    model, trainer = learner()
    trainer.step(batches(), kind="sft")
    trainer.forget_moments()
    trainer.step(batches(), kind="sft")
    saved = io.BytesIO()
    torch.save(trainer.state_dict(), saved)
    other, resumed = learner(seed=7)
    resumed.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert same(weights(model), weights(other))
    for _ in range(3):
        trainer.step(batches(), kind="sft")
        resumed.step(batches(), kind="sft")
    assert same(weights(model), weights(other))


def test_it_takes_four_bytes_a_weight_less() -> None:
    peaks, count = {}, 0
    for masters in ("float32", "none"):
        model, _ = learner(width=128, layers=16)
        count = sum(parameter.numel() for parameter in model.parameters())

        def train(model: Any = model, masters: str = masters) -> None:
            settings = config(master_weights=masters)
            trainer = LocalTrainer(model, settings, AlgorithmConfig(), temperature=1.0)
            trainer.step(batches(), kind="sft")
            trainer.step(batches(), kind="sft")

        peaks[masters] = peak_bytes(train)
    assert (peaks["float32"] - peaks["none"]) / count > 3.8, (peaks, count)


def test_other_precisions_and_states_are_refused() -> None:
    with pytest.raises(ModelError, match=r'trainer\.master_weights = "none" needs all trained weights in bfloat16'):
        RoundingAdamW([torch.ones(3).requires_grad_()], config())
    with pytest.raises(StoreError, match=r"trainer\.master_weights"):
        learner()[1].load_state_dict(learner(master_weights="float32")[1].state_dict())
    with pytest.raises(StoreError, match=r"trainer\.master_weights"):
        learner(master_weights="float32")[1].load_state_dict(learner()[1].state_dict())
