"""FSDP2 on two processes: what the agreement matrix does not show. Checkpoints that other divisions read, minibatches,
supervised steps, bfloat16, gradients that are not finite, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch
from transformers import AutoConfig

from tests.fixtures.policy_batches import policy_batches
from tests.fixtures.published_weights import largest_difference, published_weights, same
from tests.fixtures.started_ranks import StartedRanks
from tests.fixtures.tiny_modules import tiny_module
from upspiral.config.models import AlgorithmConfig, LoraConfig, ParallelConfig, TrainerConfig
from upspiral.errors import ConfigError, StoreError
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.fsdp.layout import check
from upspiral.trainer.local import LocalTrainer
from upspiral.trainer.rank_processes import start_ranks
from upspiral.trainer.ranks import Ranks
from upspiral.weights.load import load_model
from upspiral.weights.names import hugging_face_views
from upspiral.weights.probe import measured_probe
from upspiral.weights.publication import PublisherSettings
from upspiral.weights.receiver import read_probe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {family: tmp_path_factory.mktemp(family) for family in ("qwen3", "qwen3-moe")}
    for family, folder in found.items():
        tiny_module(family).save_pretrained(folder)
    return found


def setup_of(folder: Path, dtype: Any = "float32", count: int = 2, **changes: Any) -> TrainerSetup:
    division = {key: changes.pop(key) for key in ("tensor", "expert") if key in changes}
    config = TrainerConfig(**{"lr": 1e-4, "parallel": ParallelConfig(ranks=count, **division), **changes})
    return TrainerSetup(folder, dtype, "cpu", config, AlgorithmConfig(), temperature=1.0)


def local(setup: TrainerSetup) -> tuple[LocalTrainer, Any]:
    loaded = load_model(setup.model_folder, dtype=setup.dtype, device="cpu")
    return LocalTrainer(loaded.module, setup.trainer, setup.algorithm, temperature=1.0), loaded.module


def test_a_publication_has_the_probe_of_its_weights(
    two_ranks: StartedRanks, folders: dict[str, Path], tmp_path: Path
) -> None:
    backend = two_ranks.trainer("fsdp", setup_of(folders["qwen3-moe"], expert=2))
    backend.step(policy_batches(0))
    published = backend.publish(PublisherSettings(tmp_path), 1)
    wanted = measured_probe(load_model(published.folder, dtype="float32", device="cpu").module)
    found = read_probe(published.folder)
    assert found is not None and found["token_ids"] == wanted.token_ids
    assert found["logprobs"] == pytest.approx(wanted.logprobs, abs=1e-5)


@pytest.mark.parametrize(("family", "other"), [("qwen3", {"tensor": 2}), ("qwen3-moe", {"expert": 2})])
def test_a_checkpoint_goes_on_in_another_division(
    two_ranks: StartedRanks, folders: dict[str, Path], tmp_path: Path, family: str, other: dict[str, int]
) -> None:
    steps = [policy_batches(seed) for seed in range(3)]
    first = two_ranks.trainer("fsdp", setup_of(folders[family], lr_warmup_steps=3))
    first.step(steps[0])
    (tmp_path / "checkpoint").mkdir()
    first.save(tmp_path / "checkpoint")
    saved = published_weights(first, tmp_path / "a")
    wanted = [first.step(batches) for batches in steps[1:]]
    ended = published_weights(first, tmp_path / "a", 2)
    first.load(tmp_path / "checkpoint")
    assert first.step(steps[1]).grad_norm == wanted[0].grad_norm

    resumed = two_ranks.trainer("fsdp", setup_of(folders[family], lr_warmup_steps=3, **other))
    resumed.load(tmp_path / "checkpoint")
    assert same(published_weights(resumed, tmp_path / "b"), saved)
    got = [resumed.step(batches) for batches in steps[1:]]
    assert [each.lr for each in got] == [each.lr for each in wanted] == pytest.approx([5e-5, 7.5e-5])
    assert [each.grad_norm for each in got] == pytest.approx([each.grad_norm for each in wanted], rel=1e-5)
    assert largest_difference(published_weights(resumed, tmp_path / "b", 2), ended) <= 1e-5


def test_a_checkpoint_goes_on_with_another_number_of_ranks(
    two_ranks: StartedRanks, folders: dict[str, Path], tmp_path: Path
) -> None:
    steps = [policy_batches(seed) for seed in range(2)]
    first = two_ranks.trainer("fsdp", setup_of(folders["qwen3"], tensor=2))
    first.step(steps[0])
    (tmp_path / "checkpoint").mkdir()
    first.save(tmp_path / "checkpoint")
    first.step(steps[1])
    resumed = Ranks(start_ranks(1, tmp_path / "logs"), "fsdp", setup_of(folders["qwen3"], count=1))
    try:
        resumed.load(tmp_path / "checkpoint")
        resumed.step(steps[1])
        ours, theirs = (published_weights(each, tmp_path / name) for each, name in ((resumed, "b"), (first, "a")))
        assert largest_difference(ours, theirs) <= 1e-5
        (tmp_path / "nothing").mkdir()
        with pytest.raises(StoreError, match="no checkpoint of this model"):
            resumed.load(tmp_path / "nothing")
    finally:
        resumed.close()


def test_minibatches_supervised_steps_and_fresh_moments_are_those_of_the_local_trainer(
    two_ranks: StartedRanks, folders: dict[str, Path], tmp_path: Path
) -> None:
    setup = setup_of(folders["qwen3"], lr=1e-3, minibatches=2, activation_checkpointing=True)
    backend, (trainer, module) = two_ranks.trainer("fsdp", setup), local(setup)
    for each in (backend, trainer):
        each.step(policy_batches(0), kind="sft", lr=1e-4)
        each.forget_moments()
    batches = policy_batches(1, minibatches=2)
    ours, theirs = backend.step(batches), trainer.step(batches)
    assert len({batch.minibatch for batch in batches}) == 2 and theirs.tokens["drift_kl"] > 0
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4, abs=1e-6)
    assert ours.tokens == pytest.approx(theirs.tokens, rel=1e-3, abs=1e-5)
    assert largest_difference(published_weights(backend, tmp_path), hugging_face_views(module)) <= 1e-5


def test_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(
    two_ranks: StartedRanks, folders: dict[str, Path], tmp_path: Path
) -> None:
    backend = two_ranks.trainer("fsdp", setup_of(folders["qwen3"]))
    before = published_weights(backend, tmp_path, 1)
    assert backend.step(spoiled(policy_batches(0))).skipped_steps == 1
    assert same(published_weights(backend, tmp_path, 2), before)
    assert backend.step(policy_batches(0)).skipped_steps == 0
    after = published_weights(backend, tmp_path, 3)
    assert all(torch.isfinite(each).all() for each in after.values()) and not same(after, before)
    assert backend.step([]).trained_tokens == 0
    assert same(published_weights(backend, tmp_path, 4), after)


def spoiled(batches: Sequence[ForestBatch]) -> list[ForestBatch]:
    """One token of one lane has a weight that is not finite."""
    weights = batches[-1].token_weight_M.copy()
    weights[0] = float("inf")
    return [*batches[:-1], replace(batches[-1], token_weight_M=weights)]


def test_bfloat16_computes_in_it_and_keeps_masters_in_float32(
    two_ranks: StartedRanks, folders: dict[str, Path], tmp_path: Path
) -> None:
    setup = setup_of(folders["qwen3"], "bfloat16", lr=1e-5)
    backend, (trainer, module) = two_ranks.trainer("fsdp", setup), local(setup)
    begun = published_weights(backend, tmp_path, 1)
    assert same(begun, {name: tensor.clone() for name, tensor in hugging_face_views(module).items()})
    for seed in range(6):
        ours, theirs = backend.step(policy_batches(seed)), trainer.step(policy_batches(seed))
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.03)
        assert ours.loss == pytest.approx(theirs.loss, abs=2e-3)
    after = published_weights(backend, tmp_path, 2)
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    # Steps of 1e-5 are below what bfloat16 takes near 0.2; of their sum, some weights show the rounding.
    moved = [(after[name] != begun[name]).float().mean().item() for name in after if "proj" in name]
    assert all(0.0 < each < 0.5 for each in moved)
    assert largest_difference(after, hugging_face_views(module)) <= 1e-3


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("qwen3", {"lora": LoraConfig()}, "trainer.lora"),
        ("qwen3", {"master_weights": "none"}, "trainer.master_weights"),
        ("qwen3", {"count": 4}, "trainer.parallel.ranks = 4, but 2"),
        ("qwen3", {"expert": 2}, "trainer.parallel.expert = 2, but the model has no experts"),
        ("qwen3-moe", {"tensor": 2, "expert": 2}, "trainer.parallel.tensor = 2 and trainer.parallel.expert = 2"),
        ("qwen3-moe", {"count": 12, "ranks": 12, "expert": 3}, "expert = 3 does not divide the model's 8 experts"),
        ("qwen3", {"count": 12, "ranks": 12, "tensor": 4}, "tensor = 4 does not divide the model's 2 key heads"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(
    folders: dict[str, Path], family: str, changes: dict[str, Any], names: str
) -> None:
    started = changes.pop("ranks", 2)
    with pytest.raises(ConfigError, match=names):
        check(setup_of(folders[family], **changes), AutoConfig.from_pretrained(folders[family]), started)
