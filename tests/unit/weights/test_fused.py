"""Fusing projections changes where weights live, never what the model is."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from upspiral.errors import ModelError
from upspiral.weights.fused import fuse_projections
from upspiral.weights.load import LoadedModel


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def _logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def _weight(model: LlamaForCausalLM, name: str) -> torch.Tensor:
    return model.get_parameter(f"model.{name}.weight").data


def test_forward_and_names_are_unchanged(model: LlamaForCausalLM) -> None:
    names, before = list(model.state_dict()), _logits(model)
    fuse_projections(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(_logits(model), before, rtol=0, atol=0)


def test_in_place_updates_show_in_the_fused_tensors(model: LlamaForCausalLM) -> None:
    layers = fuse_projections(model)
    queries = _weight(model, "layers.1.self_attn.q_proj").add_(1.0)
    _weight(model, "layers.1.self_attn.v_proj").copy_(torch.full((32, 64), 7.0))
    _weight(model, "layers.1.mlp.up_proj").zero_()
    torch.testing.assert_close(layers[1].qkv[:64], queries)
    assert (layers[1].qkv[96:] == 7.0).all()
    assert layers[1].gate_up is not None
    assert (layers[1].gate_up[128:] == 0).all()


def test_an_optimizer_step_shows_in_the_fused_tensors(model: LlamaForCausalLM) -> None:
    layers = fuse_projections(model)
    before = layers[0].qkv.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.arange(20)[None]).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, layers[0].qkv)
    whole = torch.cat([_weight(model, f"layers.0.self_attn.{name}_proj") for name in "qkv"])
    torch.testing.assert_close(layers[0].qkv, whole, rtol=0, atol=0)


def test_state_dict_round_trip_keeps_the_views(model: LlamaForCausalLM) -> None:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(2.0)
    loaded = LoadedModel.from_module(model)
    model.load_state_dict(other.state_dict())
    loaded.check_fused()
    torch.testing.assert_close(_logits(model), _logits(other))
    torch.testing.assert_close(loaded.layers[0].qkv[:64], _weight(other, "layers.0.self_attn.q_proj"))


def test_fusing_twice_gives_the_same_tensors(model: LlamaForCausalLM) -> None:
    first, second = fuse_projections(model), fuse_projections(model)
    assert first[0].qkv.data_ptr() == second[0].qkv.data_ptr()
    assert first[0].qkv.shape == second[0].qkv.shape
    assert first[1].gate_up is not None and second[1].gate_up is not None
    assert torch.equal(first[1].gate_up, second[1].gate_up)


def test_a_replaced_weight_is_noticed(model: LlamaForCausalLM) -> None:
    loaded = LoadedModel.from_module(model)
    loaded.check_fused()
    model.double()
    with pytest.raises(ModelError, match="replaced instead of updated in place"):
        loaded.check_fused()
