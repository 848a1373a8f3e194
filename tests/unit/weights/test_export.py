"""An exported folder is the trained model: transformers loads it and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the [train] extra")

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures.tiny_model import make_model
from upspiral.cli.main import run_command
from upspiral.config.loader import dump_toml
from upspiral.config.models import RunConfig
from upspiral.errors import ModelError
from upspiral.rendering.renderer import Renderer
from upspiral.trainer.checkpoint import save_checkpoint
from upspiral.trainer.local import LocalTrainer
from upspiral.types import Message, ToolSpec
from upspiral.weights.export import export_hf
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
    save_checkpoint(run / "checkpoints", 3, {**trainer.state_dict(), "step": 3}, keep=1)
    assert run_command(["export", str(run), "--hf", str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model.module(IDS).logits, rtol=0, atol=1e-5)
    assert run_command(["export", str(run), "--hf", str(tmp_path / "other"), "--step", "2"]) == 2
    assert "checkpoints of steps 3" in capsys.readouterr().err
