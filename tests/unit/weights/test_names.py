"""What is published has the names and forms of `save_pretrained`, and goes back where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the [train] extra")

from safetensors.torch import load_file
from torch import Tensor

from tests.fixtures.tiny_modules import FAMILIES, tiny_module
from upspiral.weights.load import LoadedModel
from upspiral.weights.names import hugging_face_views


def saved(family: str, folder: Path, *, tied: bool) -> dict[str, Tensor]:
    tiny_module(family, tie_word_embeddings=tied).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_forms_are_those_of_save_pretrained(family: str, tied: bool, tmp_path: Path) -> None:
    expected = saved(family, tmp_path, tied=tied)
    if tied:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    model = LoadedModel.from_module(tiny_module(family, tie_word_embeddings=tied))  # its projections are fused
    found = hugging_face_views(model.module)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_there_is_in_the_module(family: str) -> None:
    source, target = tiny_module(family), tiny_module(family)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        ids = torch.arange(20)[None]
        assert not torch.equal(source(ids).logits, target(ids).logits)
        places = hugging_face_views(target)
        for name, tensor in hugging_face_views(source).items():
            places[name].copy_(tensor)
        assert torch.equal(source(ids).logits, target(ids).logits)
