"""An exported folder is the trained model: transformers loads it and computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the [train] extra")

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures.tiny_model import make_model
from upspiral.cli.main import run_command
from upspiral.config.loader import dump_toml
from upspiral.config.models import LoraConfig, RunConfig
from upspiral.errors import ModelError
from upspiral.rendering.renderer import Renderer
from upspiral.trainer.checkpoint import save_checkpoint
from upspiral.trainer.local import LocalTrainer
from upspiral.types import Message, ToolSpec
from upspiral.weights.adapter import Adapter
from upspiral.weights.export import export_hf, export_peft
from upspiral.weights.load import LoadedModel, load_model

IDS = torch.tensor([[1, 5, 9, 200, 31]])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_model(tmp_path / "source")


def trained(source: Path) -> LoadedModel:
    """The tiny model after something changed every weight."""
    model = load_model(source, dtype="float32", device="cpu")
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def test_transformers_loads_the_changed_weights(source: Path, tmp_path: Path) -> None:
    model = trained(source)
    folder = export_hf(model.module, source, tmp_path / "out" / "model")
    with torch.no_grad():
        expected, before = model.module(IDS).logits, AutoModelForCausalLM.from_pretrained(source)(IDS).logits
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = loaded(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - before).abs().max() > 1e-2
    assert loaded.config.tie_word_embeddings
    assert loaded.generation_config.eos_token_id == 2
    model.check_fused()


def test_its_tokenizer_renders_what_the_model_was_trained_on(source: Path, tmp_path: Path) -> None:
    folder = export_hf(trained(source).module, source, tmp_path / "model")
    tool = ToolSpec("bash", "Run a shell command.", {"type": "object", "properties": {}})
    ours = [token for segment in Renderer.from_folder(source).render([Message("user", "hello")], [tool])
            for token in segment.token_ids]  # fmt: skip
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "hello"}],
        tools=[{"type": "function", "function": {"name": tool.name, "description": tool.description,
                                                 "parameters": tool.parameters}}],
        add_generation_prompt=True, return_dict=False,
    )  # fmt: skip
    assert theirs[: len(ours)] == ours
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def adapted(source: Path, dtype: str) -> tuple[LoadedModel, Adapter]:
    """The tiny model with an adapter that changes it, merged."""
    model = load_model(source, dtype=dtype, device="cpu")
    adapter = Adapter(model.module, LoraConfig(rank=3, alpha=5.0))
    for each in adapter.weights:
        torch.nn.init.normal_(each.up_OR, std=0.3)
    adapter.merge()
    return model, adapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_loads_the_adapter(source: Path, tmp_path: Path, dtype: str) -> None:
    model, adapter = adapted(source, dtype)
    folder = export_peft(adapter, source, tmp_path / "out" / "adapter")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    with torch.no_grad():
        before, expected = base(IDS).logits, model.module(IDS).logits
        loaded = PeftModel.from_pretrained(base, folder)
        found = loaded(IDS).logits
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if dtype == "float32" else 0.05)
    merged: Any = loaded.merge_and_unload()
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, merged.get_parameter(name)), name
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template
        == AutoTokenizer.from_pretrained(export_hf(model.module, source, tmp_path / "whole")).chat_template
    )


def test_a_part_of_the_layers_is_loaded_as_that_part(source: Path, tmp_path: Path) -> None:
    model = load_model(source, dtype="float32", device="cpu")
    adapter = Adapter(model.module, LoraConfig(rank=2, target_modules=("layers.1.self_attn.v_proj", "up_proj")))
    for each in adapter.weights:
        torch.nn.init.normal_(each.up_OR, std=0.3)
    adapter.merge()
    folder = export_peft(adapter, source, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model.module(IDS).logits, rtol=0, atol=1e-4)
    assert sum("lora_A" in name for name, _ in loaded.named_parameters()) == len(adapter.weights) == 3


def test_an_existing_folder_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ModelError, match="taken exists already"):
        export_hf(trained(source).module, source, tmp_path / "taken")


def test_the_command_exports_the_newest_checkpoint(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = RunConfig.model_validate(
        {"agent": {"command": "true"}, "model": {"path": str(source), "dtype": "float32"}, "eval": {"tasks": 0}}
    )
    (run / "config.resolved.toml").write_text(dump_toml(config))
    assert run_command(["export", str(run), "--hf", str(tmp_path / "out")]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    model = trained(source)
    trainer = LocalTrainer(model.module, config.trainer, config.algorithm, temperature=1.0)
    save_checkpoint(run / "checkpoints", 3, trainer.save, keep=1)
    assert run_command(["export", str(run), "--hf", str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model.module(IDS).logits, rtol=0, atol=1e-4)
    assert run_command(["export", str(run), "--hf", str(tmp_path / "other"), "--step", "2"]) == 2
    assert "checkpoints of steps 3" in capsys.readouterr().err
    assert run_command(["export", str(run)]) == 2
    assert "give --hf FOLDER or --peft FOLDER" in capsys.readouterr().err
    assert run_command(["export", str(run), "--peft", str(tmp_path / "adapter")]) == 2
    assert "trained all weights" in capsys.readouterr().err


def test_the_command_exports_the_adapter(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = RunConfig.model_validate({
        "agent": {"command": "true"}, "model": {"path": str(source), "dtype": "float32"}, "eval": {"tasks": 0},
        "trainer": {"lora": {"rank": 2}},
    })  # fmt: skip
    (run / "config.resolved.toml").write_text(dump_toml(config))
    model = load_model(source, dtype="float32", device="cpu")
    trainer = LocalTrainer(model.module, config.trainer, config.algorithm, temperature=1.0)
    assert trainer.adapter is not None
    for each in trainer.adapter.weights:
        torch.nn.init.normal_(each.up_OR, std=0.3)
    trainer.adapter.merge()
    save_checkpoint(run / "checkpoints", 3, trainer.save, keep=1)
    assert run_command(["export", str(run), "--peft", str(tmp_path / "peft"), "--hf", str(tmp_path / "hf")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = model.module(IDS).logits
        torch.testing.assert_close(whole(IDS).logits, expected, rtol=0, atol=1e-5)
        found = PeftModel.from_pretrained(base, tmp_path / "peft")(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
