"""The trainer: learns, repeats itself bit for bit, updates in place, skips what is not finite, resumes exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fixtures.demonstrations import demonstration_graph
from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.errors import ModelError, StoreError
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.local import LocalTrainer
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import NodeCredit, RolloutCredit
from upspiral.weights.cpu import give_back_freed_memory, keep_freed_memory
from upspiral.weights.fused import fuse_projections


def model(dtype: torch.dtype = torch.float32, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    made: Any = LlamaForCausalLM(config)
    made.set_attn_implementation("sdpa")
    return made.to(dtype)


def trainer(of: LlamaForCausalLM, **changes: object) -> LocalTrainer:
    return LocalTrainer(of, TrainerConfig(**{"lr": 1e-2, **changes}), AlgorithmConfig(), temperature=1.0)  # type: ignore[arg-type]


def demonstrations() -> list[ForestBatch]:
    graphs = [demonstration_graph(str(i), [([1, 2, 3 + i], [9, 8, 7, i])]) for i in range(4)]
    return pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=20)


def rollouts(minibatches: int = 1) -> list[ForestBatch]:
    items = []
    for index, advantage in enumerate([1.0, -1.0, 0.5, -0.5]):
        graph = TrajectoryGraph(f"r{index}")
        answer = TokenRun.answer([1, 2, 3], [5, 6, index + 9], [-3.4] * 3, [0] * 3, "stop")
        graph.add(None, answer, role="assistant", reason="root")
        credit = NodeCredit(0, max(advantage, 0), min(advantage, 0))
        items.append((graph, RolloutCredit(f"r{index}", f"g{index // 2}", (credit,), 1 / 12)))
    return pack(items, tokens_per_microbatch=100, minibatches=minibatches)


def weights(of: LlamaForCausalLM) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in of.parameters()]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supervised_loss_falls(dtype: torch.dtype) -> None:
    learner = trainer(model(dtype))
    losses = [learner.step(demonstrations(), kind="sft", lr=1e-2).loss for _ in range(30)]
    assert losses[0] == pytest.approx(3.4, abs=0.4)
    assert losses[-1] < losses[0] / 4


def test_policy_step_raises_good_tokens_over_bad_ones() -> None:
    learner = trainer(model())
    first = learner.step(rollouts())
    assert first.loss == pytest.approx(0, abs=0.2)
    assert (first.unique_tokens, first.trained_tokens) == (3 + 4 * 2, 12)
    assert first.tokens["clip_fraction"] == 0
    assert first.tokens["mismatch_abs"] > 0
    assert first.tokens["entropy"] == pytest.approx(3.4, abs=0.2)
    assert {"loss", "grad_norm", "entropy"} <= first.flat().keys()
    assert first.grad_norm > 0


def test_minibatches_drift_and_the_clip_bites() -> None:
    learner = trainer(model(), lr=0.3)
    metrics = learner.step(rollouts(minibatches=2))
    assert metrics.tokens["drift_kl"] > 0
    assert metrics.tokens["clip_fraction"] > 0


def test_two_runs_are_equal_bit_for_bit() -> None:
    ends = []
    for _ in range(2):
        learned = model(torch.bfloat16)
        learner = trainer(learned)
        for _ in range(3):
            learner.step(demonstrations(), kind="sft")
            learner.step(rollouts())
        ends.append(weights(learned))
    assert same(*ends)


def test_weights_are_updated_in_place_also_where_they_are_views() -> None:
    learned = model(torch.bfloat16)
    attention: Any = learned.model.layers[0].self_attn
    fused = fuse_projections(learned)[0].qkv
    before = fused.clone()
    trainer(learned).step(demonstrations(), kind="sft")
    parts = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    assert torch.equal(fused, torch.cat(parts)) and fused.data_ptr() == parts[0].data_ptr()
    assert not torch.equal(fused, before)


def test_bfloat16_keeps_updates_that_its_precision_would_lose() -> None:
    learned = model(torch.bfloat16)
    learner = trainer(learned, lr=1e-5)
    norm = learned.model.norm.weight
    for _ in range(600):  # each step moves a weight of 1.0 by 1e-5; a bfloat16 step there is 4e-3
        learner.step(demonstrations()[:1], kind="sft")
    assert not torch.equal(norm, torch.ones_like(norm))


def test_a_gradient_that_is_not_finite_is_skipped_and_counted() -> None:
    learned = model()
    learner = trainer(learned)
    before = weights(learned)
    [batch] = rollouts()
    batch.positive_M[0] = float("inf")
    metrics = learner.step([batch])
    assert metrics.skipped_steps == 1
    assert same(before, weights(learned))
    assert learner.step(rollouts()).skipped_steps == 0
    assert all(torch.isfinite(x).all() for x in weights(learned))


def test_a_resumed_trainer_goes_on_as_if_it_had_not_stopped(tmp_path) -> None:  # type: ignore[no-untyped-def]
    learned = model(torch.bfloat16)
    learner = trainer(learned, lr_warmup_steps=3)
    learner.step(rollouts())
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    other = model(torch.bfloat16)
    resumed = trainer(other, lr_warmup_steps=3)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(weights(learned), weights(other))
    for _ in range(3):
        assert learner.step(rollouts()).lr == resumed.step(rollouts()).lr
    assert same(weights(learned), weights(other))


def test_warm_up_rises_to_the_configured_rate() -> None:
    learner = trainer(model(), lr=4e-3, lr_warmup_steps=3)
    assert [learner.step(rollouts()).lr for _ in range(5)] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 4e-3])


def test_state_of_another_model_is_refused() -> None:
    with pytest.raises(StoreError, match="other shapes"):
        trainer(model()).load_state_dict(trainer(model(width=64)).state_dict())


def test_a_model_without_trainable_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="requires_grad"):
        trainer(model().requires_grad_(False))


def test_no_batches_no_change() -> None:
    learned = model()
    before = weights(learned)
    assert trainer(learned).step([]).trained_tokens == 0
    assert same(before, weights(learned))


def test_what_only_a_step_needs_is_given_back_when_it_rests() -> None:
    keep_freed_memory()  # as a run does, so that freeing alone gives nothing back
    graphs = [demonstration_graph(str(i), [([1, 2, 3], [i + 1] * 600)]) for i in range(8)]
    batches = pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=5000)
    of = trainer(model(width=512))
    of.step(batches, kind="sft")  # its moments stay
    give_back_freed_memory()
    before = psutil.Process().memory_info().rss
    of.step(batches, kind="sft")
    held = psutil.Process().memory_info().rss - before
    of.rest()
    left = psutil.Process().memory_info().rss - before
    assert held > 50e6
    assert left < 0.2 * held, f"{left / 1e6:.0f} MB of {held / 1e6:.0f} MB"
