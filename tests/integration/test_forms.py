"""The Hugging Face form is the bridge between trainer backends, bit for bit.

Of every kind of backend a checkpoint, exported as `upspiral export` does it, is loaded into every other, and each
publishes exactly what was trained. Ranks are two; each kind divides the weights as finely as it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")
for package in ("deepspeed", "megatron"):
    if find_spec(package) is None:
        pytest.skip(f"needs the [{package}] extra", allow_module_level=True)

import torch

from tests.fixtures.policy_batches import policy_batches
from tests.fixtures.published_weights import published_weights, same, weights_of_folder
from tests.fixtures.started_ranks import StartedRanks
from tests.fixtures.tiny_model import make_tokenizer
from tests.fixtures.tiny_modules import tiny_module
from upspiral.cli.main import run_command
from upspiral.config.loader import dump_toml
from upspiral.config.models import AlgorithmConfig, RunConfig
from upspiral.trainer.base import TrainerBackend, TrainerSetup
from upspiral.trainer.checkpoint import save_checkpoint
from upspiral.trainer.export import export_checkpoint
from upspiral.trainer.local import LocalTrainer
from upspiral.weights.load import load_model

KINDS: Mapping[str, Any] = {
    "local": None,
    "fsdp": {"ranks": 2, "tensor": 2},
    "deepspeed": {"ranks": 2, "zero_stage": 3},
    "megatron": {"ranks": 2, "tensor": 2},
}
"""`trainer.kind` and [trainer.parallel]."""


class Backends:
    """One at a time of each kind. The processes are the same for all kinds: starting them takes most of the time."""

    def __init__(self, ranks: StartedRanks, dtype: Literal["bfloat16", "float32"]) -> None:
        self._ranks = ranks
        self._dtype: Literal["bfloat16", "float32"] = dtype

    def setup(self, kind: str, model: Path) -> TrainerSetup:
        config = self.config(kind, model).trainer
        return TrainerSetup(model, self._dtype, "cpu", config, AlgorithmConfig(), temperature=1.0)

    def make(self, kind: str, model: Path) -> TrainerBackend:
        setup = self.setup(kind, model)
        if kind == "local":
            module = load_model(model, dtype=self._dtype, device="cpu").module
            return LocalTrainer.of(module, setup, lanes=1, exact=False)
        return self._ranks.trainer(kind, setup)

    def config(self, kind: str, model: Path, device: str = "auto") -> RunConfig:
        parallel = {} if KINDS[kind] is None else {"parallel": KINDS[kind]}
        return RunConfig.model_validate({
            "agent": {"command": "true"}, "eval": {"tasks": 0}, "trainer": {"kind": kind, "lr": 1e-3, **parallel},
            "model": {"path": str(model), "dtype": self._dtype, "device": device},
        })  # fmt: skip

    def export(self, kind: str, model: Path, run: Path) -> Path:
        """The run's newest checkpoint as a Hugging Face folder, by a backend that did not train it."""
        if kind == "local":
            (run / "config.resolved.toml").write_text(dump_toml(self.config(kind, model)))
            assert run_command(["export", str(run), "--hf", str(run / "exported")]) == 0
            return run / "exported"
        checkpoint = run / "checkpoints" / "step-000001"
        return export_checkpoint(self.make(kind, model), self.setup(kind, model), checkpoint, run / "exported")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("qwen3", "float32"), ("qwen3-moe", "float32"), ("qwen3", "bfloat16")],
)
def test_a_checkpoint_of_every_kind_loads_into_every_other(
    family: str, dtype: Literal["bfloat16", "float32"], two_ranks: StartedRanks, tmp_path: Path
) -> None:
    model = make_tokenizer(tmp_path / "model")
    experts = {"num_experts": 4, "num_experts_per_tok": 2} if family == "qwen3-moe" else {}
    tiny_module(family, getattr(torch, dtype), num_hidden_layers=2, **experts).save_pretrained(model)
    backends = Backends(two_ranks, dtype)
    trained, exported = {}, {}
    for number, kind in enumerate(KINDS):  # on other batches each, so that no two have the same weights
        trainer = backends.make(kind, model)
        assert trainer.step([each for each in policy_batches(number) if each.lane == 0]).skipped_steps == 0
        save_checkpoint(tmp_path / kind / "checkpoints", 1, trainer.save, keep=1)
        trained[kind] = published_weights(trainer, tmp_path / kind / "weights")
        exported[kind] = backends.export(kind, model, tmp_path / kind)
    assert not any(same(trained[one], trained[other]) for one, other in combinations(KINDS, 2))
    for kind in KINDS:
        for origin in KINDS.keys() - {kind}:
            published = published_weights(backends.make(kind, exported[origin]), tmp_path / "into" / kind / origin)
            assert same(published, trained[origin]), f"{kind} from a checkpoint of {origin}"


@pytest.mark.parametrize(
    ("kind", "device", "ranks"), [("fsdp", "cuda", 64), ("megatron", "auto", 64), ("deepspeed", "cuda", 2)]
)
def test_export_needs_neither_the_devices_nor_where_it_can_the_ranks_of_the_run(
    kind: str, device: str, ranks: int, two_ranks: StartedRanks, tmp_path: Path
) -> None:
    """The checkpoint is that of two ranks on a CPU, and the run file that of a cluster, which is not at hand."""
    model = make_tokenizer(tmp_path / "model")
    tiny_module("qwen3", torch.bfloat16, num_hidden_layers=2).save_pretrained(model)
    backends, run = Backends(two_ranks, "bfloat16"), tmp_path / "run"
    trainer = backends.make(kind, model)
    trainer.step([each for each in policy_batches(0) if each.lane == 0])
    save_checkpoint(run / "checkpoints", 1, trainer.save, keep=1)
    trained = published_weights(trainer, tmp_path / "weights")
    config = dump_toml(backends.config(kind, model, device)).replace("ranks = 2", f"ranks = {ranks}")
    (run / "config.resolved.toml").write_text(config)
    assert run_command(["export", str(run), "--hf", str(tmp_path / "exported")]) == 0
    exported = weights_of_folder(tmp_path / "exported")
    assert same(exported, {name: trained[name] for name in exported}) and exported
