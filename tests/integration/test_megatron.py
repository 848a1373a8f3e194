"""Megatron-core on a CPU, which is for its logic alone: what the agreement matrix does not show. Log-probabilities are
those of transformers, checkpoints go on in other divisions, and what cannot be done is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")
if find_spec("megatron") is None:
    pytest.skip("needs the [megatron] extra", allow_module_level=True)

import numpy as np
import torch

if torch.cuda.is_available():
    pytest.skip("these are tests on a CPU, and Megatron takes CUDA where there is some", allow_module_level=True)

from safetensors.torch import load_file
from torch import distributed

from tests.fixtures.policy_batches import policy_batches
from tests.fixtures.published_weights import largest_difference, published_weights, same
from tests.fixtures.started_ranks import StartedRanks
from tests.fixtures.tiny_modules import VOCABULARY, own_routes, tiny_module
from upspiral.config.models import AlgorithmConfig, LoraConfig, ParallelConfig, TrainerConfig
from upspiral.errors import ConfigError, StoreError
from upspiral.trainer.attention import ForestPass
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.forest import ForestBatch, plain_path
from upspiral.trainer.local import LocalTrainer
from upspiral.types import UNKNOWN_EXPERT
from upspiral.weights.load import load_model
from upspiral.weights.names import hugging_face_views


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    tiny_module("qwen3-moe", tie_word_embeddings=False).save_pretrained(folder)
    return folder


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Any]:
    """The process group of a single rank in this process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def setup_of(folder: Path, dtype: Any = "float32", tensor: int = 1, **changes: Any) -> TrainerSetup:
    config = TrainerConfig(**{"lr": 1e-4, "parallel": ParallelConfig(ranks=2, tensor=tensor), **changes})
    return TrainerSetup(folder, dtype, "cpu", config, AlgorithmConfig(), temperature=1.0)


def a_path(module: Any) -> ForestBatch:
    """Every token predicts the next; half of them have routes, where there are experts."""
    batch = plain_path(np.random.default_rng(0).integers(0, VOCABULARY, 40).tolist())
    if not hasattr(module.config, "num_experts"):
        return batch
    routes = own_routes(module, batch.token_ids_T.tolist())
    routes[20:] = UNKNOWN_EXPERT
    return replace(batch, routes_TLK=routes)


_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": _LLAMA3_ROPE, "max_position_embeddings": 64}),
        ("qwen3", {}),
        ("qwen3-moe", {}),
        ("qwen3-moe", {"norm_topk_prob": False, "tie_word_embeddings": False}),
    ],
)
def test_logprobs_are_those_of_transformers(
    family: str, changes: dict[str, Any], one_rank: Any, tmp_path: Path
) -> None:
    from upspiral.trainer.megatron.backend import MegatronBackend

    module: Any = tiny_module(family, **changes)
    module.save_pretrained(tmp_path)
    backend = MegatronBackend(setup_of(tmp_path, parallel=ParallelConfig()))
    batch = a_path(module)
    logprobs, entropy = backend.model.target_logprobs(batch, ForestPass(batch), 0.7)
    with torch.no_grad():
        wanted = (module(torch.from_numpy(batch.token_ids_T)[None]).logits[0, :-1] / 0.7).log_softmax(-1)
    assert torch.allclose(logprobs, wanted.gather(1, torch.from_numpy(batch.targets_M)[:, None])[:, 0], atol=2e-5)
    assert torch.allclose(entropy, -(wanted.exp() * wanted).sum(1), atol=2e-5)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_a_checkpoint_goes_on_in_another_division(
    two_ranks: StartedRanks, untied: Path, tmp_path: Path, before: int, after: int
) -> None:
    steps = [policy_batches(seed) for seed in range(2)]
    first = two_ranks.trainer("megatron", setup_of(untied, tensor=before, lr_warmup_steps=3))
    assert same(published_weights(first, tmp_path / "a", 0), load_file(untied / "model.safetensors"))
    first.step(steps[0])
    (tmp_path / "checkpoint").mkdir()
    first.save(tmp_path / "checkpoint")
    saved = published_weights(first, tmp_path / "a", 1)
    wanted = first.step(steps[1])
    ended = published_weights(first, tmp_path / "a", 2)

    resumed = two_ranks.trainer("megatron", setup_of(untied, tensor=after, lr_warmup_steps=3))
    resumed.load(tmp_path / "checkpoint")
    assert same(published_weights(resumed, tmp_path / "b", 1), saved) and not same(saved, ended)
    got = resumed.step(steps[1])
    assert got.lr == wanted.lr == pytest.approx(5e-5)
    assert got.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)
    apart = largest_difference(published_weights(resumed, tmp_path / "b", 2), ended)
    assert apart <= (0.0 if before == after else 1e-5)


def test_minibatches_supervised_steps_and_fresh_moments_are_those_of_the_local_trainer(
    two_ranks: StartedRanks, untied: Path, tmp_path: Path
) -> None:
    setup = setup_of(untied, tensor=2, minibatches=2, activation_checkpointing=True)
    backend, loaded = two_ranks.trainer("megatron", setup), load_model(untied, dtype="float32", device="cpu")
    trainer = LocalTrainer(loaded.module, setup.trainer, setup.algorithm, temperature=1.0)
    for each in (backend, trainer):
        each.step(policy_batches(0), kind="sft", lr=1e-5)
        each.forget_moments()
    batches = policy_batches(1, minibatches=2)
    ours, theirs = backend.step(batches), trainer.step(batches)
    assert theirs.tokens["drift_kl"] > 0
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4, abs=1e-5)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    assert ours.tokens == pytest.approx(theirs.tokens, rel=1e-3, abs=1e-5)
    assert largest_difference(published_weights(backend, tmp_path, 1), hugging_face_views(loaded.module)) <= 1e-5


def test_bfloat16_has_masters_and_a_gradient_that_is_not_finite_is_skipped(
    two_ranks: StartedRanks, untied: Path, tmp_path: Path
) -> None:
    backend = two_ranks.trainer("megatron", setup_of(untied, "bfloat16", tensor=2, lr=1e-7))
    before = published_weights(backend, tmp_path, 0)
    spoilt = policy_batches(0)
    next(batch for batch in spoilt if batch.num_targets).positive_M[0] = float("inf")
    metrics = backend.step(spoilt)
    assert metrics.skipped_steps == 1 and not np.isfinite(metrics.grad_norm)
    assert same(published_weights(backend, tmp_path, 1), before)

    batches = [batch for batch in policy_batches(1) if batch.lane in (0, 3)]
    for _ in range(2):  # each less than a weight of bfloat16 can take, the masters take all
        assert backend.step(batches).skipped_steps == 0
    (tmp_path / "checkpoint").mkdir()
    backend.save(tmp_path / "checkpoint")
    resumed = two_ranks.trainer("megatron", setup_of(untied, "float32", tensor=2))
    resumed.load(tmp_path / "checkpoint")
    masters = published_weights(resumed, tmp_path / "masters", 1)
    moved = {name: (masters[name] - before[name].float()).abs().max().item() for name in before}
    assert all(0 < distance < 1e-6 for distance in moved.values()), moved
    assert all(before[name].dtype == torch.bfloat16 for name in before)


def test_what_is_no_checkpoint_of_its_own_is_refused(one_rank: Any, untied: Path, tmp_path: Path) -> None:
    from upspiral.trainer.megatron.backend import MegatronBackend

    backend = MegatronBackend(setup_of(untied, parallel=ParallelConfig()))
    with pytest.raises(StoreError, match="no checkpoint of this model"):
        backend.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoraConfig()}, r"trainer.lora = .* supports None"),
        ({"master_weights": "none"}, r"trainer.master_weights = 'none'"),
        ({"parallel": ParallelConfig(ranks=2, expert=2)}, r"trainer.parallel.expert = 2"),
        ({"parallel": ParallelConfig(ranks=2)}, r"trainer.parallel.ranks = 2, but 1 ranks were started"),
    ],
)
def test_what_it_does_not_do_is_refused(changes: dict[str, Any], message: str, one_rank: Any, untied: Path) -> None:
    from upspiral.trainer.megatron.backend import MegatronBackend

    with pytest.raises(ConfigError, match=message):
        MegatronBackend(setup_of(untied, **changes))


def test_a_division_that_does_not_fit_the_model_is_refused() -> None:
    from upspiral.trainer.megatron.backend import check_division

    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    config = tiny_module("llama", rope_parameters=yarn).config
    with pytest.raises(ConfigError, match=r"trainer.parallel.tensor = 4 does not divide the model's key heads \(2\)"):
        check_division(config, 4)
    with pytest.raises(ConfigError, match="yarn"):
        check_division(config, 2)
