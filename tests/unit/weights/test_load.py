"""A model folder either loads whole or says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from upspiral.errors import ModelError
from upspiral.weights.load import load_model


def _config(**changes: object) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**{"vocab_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True, **sizes, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LlamaForCausalLM(_config()).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_with_tied_embeddings(folder: Path, dtype: str) -> None:
    model = load_model(folder, dtype=dtype, device="cpu")
    assert model.dtype == getattr(torch, dtype)
    assert model.device.type == "cpu"
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert model.config._attn_implementation == "sdpa"
    model.check_fused()


def test_what_is_saved_loads_again(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = load_model(folder, dtype="float32", device="cpu")
    model.module.get_parameter("model.layers.0.self_attn.k_proj.weight").data.add_(1.0)
    copy = tmp_path_factory.mktemp("copy")
    model.module.save_pretrained(copy)
    again = load_model(copy, dtype="float32", device="cpu")
    for (name, expected), actual in zip(
        model.module.state_dict().items(), again.module.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, actual), name


def test_untied_head_is_its_own(tmp_path: Path) -> None:
    LlamaForCausalLM(_config(tie_word_embeddings=False)).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32", device="cpu")
    assert model.module.lm_head.weight is not model.module.model.embed_tokens.weight


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        load_model(tmp_path / "absent", dtype="float32", device="cpu")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing.*upspiral model get smollm2-135m"):
        load_model(tmp_path, dtype="float32", device="cpu")


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"without weights: model\.safetensors is missing.*upspiral model get"):
        load_model(folder, dtype="float32", device="cpu")


def test_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        load_model(folder, dtype="float32", device="cpu")


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(folder, dtype="float32", device="cpu")


def test_missing_tensor_is_not_left_random(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, dtype="float32", device="cpu")


def test_other_architecture_is_named(folder: Path) -> None:
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(folder)
    with pytest.raises(ModelError, match="GPT2LMHeadModel"):
        load_model(folder, dtype="float32", device="cpu")


def test_unsupported_variant_is_named(folder: Path) -> None:
    _config(attention_bias=True).save_pretrained(folder)
    with pytest.raises(ModelError, match="attention_bias"):
        load_model(folder, dtype="float32", device="cpu")
