"""Weights read one parameter at a time are those that transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.tiny_modules import FAMILIES, tiny_module
from upspiral.errors import ModelError
from upspiral.weights.load import load_module
from upspiral.weights.model_files import ModelFiles


def filled(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    files = ModelFiles(folder)
    module = files.skeleton()
    for number, layer in enumerate(module.model.layers):
        files.fill(layer, f"model.layers.{number}.", dtype, "cpu")
    files.fill(module, "", dtype, "cpu")
    module.tie_weights()
    return module


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_filled_skeleton_is_the_loaded_module(tmp_path: Path, family: str, tied: bool) -> None:
    tiny_module(family, tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size="100KB")
    ours, theirs = dict(filled(tmp_path).named_parameters()), dict(load_module(tmp_path, "float32").named_parameters())
    assert ours.keys() == theirs.keys() and ("lm_head.weight" in ours) != tied
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(filled(tmp_path)(tokens).logits, load_module(tmp_path, "float32")(tokens).logits)


def test_masters_of_a_model_in_bfloat16_begin_as_its_weights(tmp_path: Path) -> None:
    tiny_module("qwen3").save_pretrained(tmp_path)
    masters, rounded = filled(tmp_path, torch.bfloat16), load_module(tmp_path, "bfloat16")
    for ours, theirs in zip(masters.parameters(), rounded.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lack model.norm.weight"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight .* is \[3\], but .* asks for \[64\]",
        ),
    ],
)
def test_files_that_do_not_fit_the_config_say_so(tmp_path: Path, change, says: str) -> None:  # type: ignore[no-untyped-def]
    tiny_module("qwen3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=says):
        filled(tmp_path)


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    tiny_module("qwen3").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        filled(tmp_path)
