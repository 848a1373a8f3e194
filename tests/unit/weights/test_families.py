"""Every family loads, is fused, trained and exported; what cannot be computed is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.fixtures.tiny_model import make_tokenizer
from tests.fixtures.tiny_modules import FAMILIES, tiny_module
from upspiral.errors import ModelError
from upspiral.weights.export import export_hf
from upspiral.weights.load import LoadedModel, load_model

IDS = torch.arange(30)[None]


def folder_of(family: str, folder: Path, **changes: Any) -> Path:
    make_tokenizer(folder)
    tiny_module(family, **changes).save_pretrained(folder)
    return folder


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_loaded_computes_what_was_saved(family: str, dtype: str, tmp_path: Path) -> None:
    loaded = load_model(folder_of(family, tmp_path), dtype=dtype, device="cpu")
    loaded.check_fused()
    assert loaded.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits(loaded.module), logits(tiny_module(family, loaded.dtype)), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_was_trained_and_exported(family: str, tmp_path: Path) -> None:
    source = folder_of(family, tmp_path / "source")
    loaded = load_model(source, dtype="float32", device="cpu")
    before = logits(loaded.module)
    optimizer = torch.optim.AdamW(loaded.module.parameters(), lr=0.05)
    module: Any = loaded.module
    module(IDS).logits.square().mean().backward()
    assert [name for name, each in module.named_parameters() if each.grad is None] == []
    optimizer.step()
    loaded.check_fused()
    exported = AutoModelForCausalLM.from_pretrained(export_hf(module, source, tmp_path / "out"), dtype=torch.float32)
    assert type(exported) is type(module)
    torch.testing.assert_close(logits(exported), logits(module), rtol=0, atol=1e-5)
    assert (logits(exported) - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window"),
    ],
)
@pytest.mark.parametrize("family", [each for each in FAMILIES if each != "llama"])
def test_unsupported_variant_is_named(family: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        LoadedModel.from_module(tiny_module(family, **changes))
