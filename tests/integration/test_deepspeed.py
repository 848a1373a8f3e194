"""DeepSpeed as a trainer: what its engine does besides agreeing with the local trainer (test_backends_agree.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("deepspeed", reason="needs the [deepspeed] extra")

import torch

from tests.fixtures.demonstrations import demonstration_graph
from tests.fixtures.policy_batches import policy_batches
from tests.fixtures.published_weights import published_weights, same
from tests.fixtures.started_ranks import StartedRanks
from tests.fixtures.tiny_modules import tiny_module
from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import AlgorithmConfig, ParallelConfig, TrainerConfig
from upspiral.errors import ConfigError, StoreError
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.local import LocalTrainer
from upspiral.trainer.rank_processes import start_ranks
from upspiral.trainer.ranks import Ranks
from upspiral.trainer.registry import make_backend
from upspiral.weights.load import load_module
from upspiral.weights.probe import measured_probe
from upspiral.weights.publication import PublisherSettings
from upspiral.weights.receiver import read_probe


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed") / "model"
    tiny_module("qwen3", torch.bfloat16).save_pretrained(folder)
    return folder


def setup(
    folder: Path, stage: int, *, ranks: int = 2, dtype: Literal["bfloat16", "float32"] = "bfloat16", **changes: object
) -> TrainerSetup:
    trainer = {"kind": "deepspeed", "parallel": ParallelConfig(ranks=ranks, zero_stage=stage), "lr": 1e-3, **changes}
    return TrainerSetup(folder, dtype, "cpu", TrainerConfig.model_validate(trainer), AlgorithmConfig(), 1.0)


def batches(seed: int, minibatches: int = 1) -> list[ForestBatch]:
    """One lane for each rank."""
    return [batch for batch in policy_batches(seed, minibatches=minibatches) if batch.lane in (0, 3)]


def test_backward_passes_one_after_the_other_add_up(two_ranks: StartedRanks, tmp_path: Path) -> None:
    """A path of batches, each the context of the next, for one rank alone; and an output layer of its own."""
    module = tiny_module("llama", tie_word_embeddings=False)
    module.save_pretrained(tmp_path / "model")
    graph = demonstration_graph("path", [(range(20 * turn, 20 * turn + 12), range(8)) for turn in range(5)])
    path = pack([(graph, sft_credit([graph])[0])], tokens_per_microbatch=20)
    assert [batch.context_length for batch in path] == [0, 20, 40, 60, 80]
    made = setup(tmp_path / "model", 3, dtype="float32")
    found = two_ranks.trainer("deepspeed", made).step(path, kind="sft")
    expected = LocalTrainer(module, made.trainer, made.algorithm, temperature=1.0).step(path, kind="sft")
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped(
    stage: int, two_ranks: StartedRanks, model_folder: Path, tmp_path: Path
) -> None:
    trainer = two_ranks.trainer("deepspeed", setup(model_folder, stage, lr_warmup_steps=5))
    trainer.step(batches(0))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    trainer.save(checkpoint)
    metrics, after = trainer.step(batches(1, minibatches=2)), published_weights(trainer, tmp_path / "a", 1)
    parts = [path.stat().st_size for path in checkpoint.rglob("*optim_states.pt")]
    assert len(parts) == 2 and max(parts) < 1.1 * min(parts)

    resumed = two_ranks.trainer("deepspeed", setup(model_folder, stage, lr_warmup_steps=5))
    resumed.load(checkpoint)
    again = resumed.step(batches(1, minibatches=2))
    assert (again.loss, again.grad_norm, again.lr) == (metrics.loss, metrics.grad_norm, metrics.lr)
    assert again.lr == pytest.approx(1e-3 * 2 / 6)
    assert same(after, published_weights(resumed, tmp_path / "b", 1))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(
    stage: int, two_ranks: StartedRanks, model_folder: Path, tmp_path: Path
) -> None:
    trainer = two_ranks.trainer("deepspeed", setup(model_folder, stage))
    before = published_weights(trainer, tmp_path, 0)
    spoilt = batches(0)
    next(batch for batch in spoilt if batch.num_targets).positive_M[0] = float("inf")
    metrics = trainer.step(spoilt)
    assert (metrics.skipped_steps, metrics.grad_norm) == (1, float("inf"))
    assert same(before, published_weights(trainer, tmp_path, 1))
    assert trainer.step(batches(0)).skipped_steps == 0
    after = published_weights(trainer, tmp_path, 2)
    assert all(torch.isfinite(tensor).all() for tensor in after.values()) and not same(before, after)


def test_a_publication_has_the_probe_of_its_weights(
    two_ranks: StartedRanks, model_folder: Path, tmp_path: Path
) -> None:
    trainer = two_ranks.trainer("deepspeed", setup(model_folder, 3, dtype="float32"))
    trainer.step(batches(0))
    trainer.publish(PublisherSettings(tmp_path), 1)
    trainer.step(batches(1))  # of what was gathered to publish, nothing may be left
    folder = trainer.publish(PublisherSettings(tmp_path), 2).folder
    found, expected = read_probe(folder), measured_probe(load_module(folder, "float32"))
    assert found is not None and found["token_ids"] == expected.token_ids
    assert found["logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)


def test_forgotten_moments_are_those_of_a_new_trainer(
    two_ranks: StartedRanks, model_folder: Path, tmp_path: Path
) -> None:
    trainer = two_ranks.trainer("deepspeed", setup(model_folder, 2, dtype="float32"))
    trainer.step(batches(0), lr=1e-9)  # too little to change the gradients after it
    trainer.forget_moments()
    trainer.step(batches(1), lr=1e-3)
    found = published_weights(trainer, tmp_path / "forgotten", 0)
    trainer = two_ranks.trainer("deepspeed", setup(model_folder, 2, dtype="float32"))
    trainer.step(batches(1), lr=1e-3)
    expected = published_weights(trainer, tmp_path / "new", 0)
    differences = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    assert differences.abs().mean() < 1e-5


def test_a_checkpoint_that_is_divided_otherwise_is_refused(model_folder: Path, tmp_path: Path) -> None:
    trainer = Ranks(start_ranks(1, tmp_path / "logs"), "deepspeed", setup(model_folder, 2, ranks=1))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    trainer.save(checkpoint)
    written = checkpoint / "deepspeed.json"
    written.write_text(written.read_text().replace('"ranks": 1', '"ranks": 4'))
    with pytest.raises(StoreError, match=r"written by 4 ranks in ZeRO stage 2.* here are 1 in stage 2"):
        trainer.load(checkpoint)
    trainer.close()


def test_what_it_does_not_do_is_refused(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.master_weights = 'none', but .* supports 'float32'"):
        make_backend("deepspeed", setup(model_folder, 1, master_weights="none"))
