"""LoRA: only the factors learn, the weights stay the base plus their product, and everything else stays as exact."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fixtures.demonstrations import demonstration_graph
from tests.fixtures.memory import peak_bytes
from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import AlgorithmConfig, LoraConfig, TrainerConfig
from upspiral.errors import ConfigError, StoreError
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.local import LocalTrainer
from upspiral.weights.load import LoadedModel


def batches(lanes: int = 1) -> list[ForestBatch]:
    graphs = [demonstration_graph(str(i), [([1, 2, 3] * 8, [9, 8, 7, i] * 8)]) for i in range(6)]
    return pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=50, lanes=lanes)


def learner(
    *targets: str, dtype: torch.dtype = torch.bfloat16, lanes: int = 1, **changes: Any
) -> tuple[LoadedModel, LocalTrainer]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, head_dim=32, initializer_range=0.3,
    )  # fmt: skip
    module: Any = LlamaForCausalLM(config)
    loaded = LoadedModel.from_module(module.to(dtype))
    lora = LoraConfig(rank=4, alpha=8, target_modules=targets)
    settings = TrainerConfig(**{"lr": 1e-2, "lora": lora, **changes})
    return loaded, LocalTrainer(loaded.module, settings, AlgorithmConfig(), temperature=1.0, lanes=lanes)


def weights(of: LoadedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in of.module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supervised_loss_falls(dtype: torch.dtype) -> None:
    _, trainer = learner(dtype=dtype)
    losses = [trainer.step(batches(), kind="sft").loss for _ in range(40)]
    assert losses[-1] < losses[0] / 3


def test_weights_are_the_base_and_the_product_and_the_others_stay() -> None:
    loaded, trainer = learner("q_proj", "mlp.down_proj")
    before = weights(loaded)
    for _ in range(3):
        trainer.step(batches(), kind="sft")
    after, adapted = weights(loaded), {f"{each.name}.weight": each for each in adapter_of(trainer).weights}
    assert set(adapted) == {
        f"model.layers.{layer}.{end}.weight" for layer in (0, 1) for end in ("self_attn.q_proj", "mlp.down_proj")
    }
    for name in after:
        if name not in adapted:
            assert torch.equal(before[name], after[name])
            continue
        each = adapted[name]
        assert torch.equal(each.base_OI, before[name])
        expected = (before[name].float() + (each.up_OR @ each.down_RI) * 2.0).to(torch.bfloat16)
        assert torch.equal(after[name], expected)
        assert not torch.equal(after[name], before[name])
    loaded.check_fused()


def adapter_of(trainer: LocalTrainer) -> Any:
    assert trainer.adapter is not None
    return trainer.adapter


def test_a_zero_product_gives_the_base_back_to_the_bit() -> None:
    loaded, trainer = learner()
    before = weights(loaded)
    for _ in range(5):
        trainer.step(batches(), kind="sft")
    assert not same(before, weights(loaded))
    for each in adapter_of(trainer).weights:
        each.up_OR.zero_()
    adapter_of(trainer).merge()
    assert same(before, weights(loaded))


def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped() -> None:
    loaded, trainer = learner()
    trainer.step(batches(), kind="sft")
    saved = io.BytesIO()
    torch.save(trainer.state_dict(), saved)
    other, resumed = learner()
    resumed.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert same(weights(loaded), weights(other))
    for _ in range(3):
        trainer.step(batches(), kind="sft")
        resumed.step(batches(), kind="sft")
    assert same(weights(loaded), weights(other))


def test_state_of_a_run_without_an_adapter_is_refused() -> None:
    with pytest.raises(StoreError, match="other shapes"):
        learner()[1].load_state_dict(learner(lora=None)[1].state_dict())


def test_factors_of_another_base_are_refused() -> None:
    state = learner()[1].state_dict()
    learner()[1].load_state_dict(state)
    loaded, _ = learner(lora=None)
    with torch.no_grad():
        loaded.module.model.norm.weight[3] = 1.5
    settings = TrainerConfig(lora=LoraConfig(rank=4, alpha=8))
    other = LocalTrainer(loaded.module, settings, AlgorithmConfig(), temperature=1.0)
    with pytest.raises(StoreError, match="other base weights"):
        other.load_state_dict(state)


def test_lanes_and_checkpointing_do_not_change_the_step() -> None:
    ends: list[dict[str, Tensor]] = []
    for changes in ({}, {"activation_checkpointing": True}, {"lanes": 2}, {"lanes": 2}):
        loaded, trainer = learner(dtype=torch.float32, **changes)
        for _ in range(2):
            trainer.step(batches(changes.get("lanes", 1)), kind="sft")
        ends.append(weights(loaded))
    assert same(ends[0], ends[1])
    assert same(ends[2], ends[3])
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[2][name], rtol=1e-4, atol=1e-5)


def test_it_takes_less_memory() -> None:
    """No gradients, masters and moments of whole weights."""
    forest, peaks = batches(), []
    for lora in (None, LoraConfig(rank=2)):
        _, trainer = learner(lora=lora)
        trainer.step(forest, kind="sft")
        peaks.append(peak_bytes(lambda trainer=trainer: trainer.step(forest, kind="sft")))
        peaks.append(sum(bytes_of(trainer.state_dict())))
    assert peaks[2] < peaks[0] and peaks[3] < peaks[1] / 4, peaks


def bytes_of(state: Any) -> Sequence[int]:
    if isinstance(state, Tensor):
        return [state.nbytes]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [size for value in values for size in bytes_of(value)]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "has a name that ends with 'q_prj'; did you mean 'q_proj'?"),
        ("layers.7.mlp.up_proj", "did you mean 'model.layers."),
        ("lm_head", "there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        ("proj", "did you mean"),
    ],
)
def test_a_layer_that_is_not_there_is_named_with_the_closest(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.lora\.target_modules") as caught:
        learner("k_proj", target)
    assert message in str(caught.value)
