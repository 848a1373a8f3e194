"""The agreement matrix: every trainer backend, however it divides the model, does what the local trainer does.

From the same weights, on the same three steps of forest batches (GRPO's credit, shared prefixes, trees that are split
with context, replayed routes where there are experts), in float32. One step has two minibatches, of which PPO clips
some tokens, and one has a gradient that is clipped, which AdamW does not see unless others are not. Compared are each
step's loss and gradient norm, and each weight tensor afterwards: L2 of the difference over L2 of the tensor. (Over L2
of what the tensor *moved* would say little: AdamW makes steps of full size of gradients that are nothing but
rounding.) And what a backend publishes before it trains has the bits of the folder that it was made from, so that one
backend goes on from another's weights.

A backend joins by a line in `MATRIX`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch

from tests.fixtures.policy_batches import policy_batches
from tests.fixtures.started_ranks import StartedRanks
from tests.fixtures.tiny_modules import FAMILIES, tiny_module
from upspiral.config.models import AlgorithmConfig, ParallelConfig, TrainerConfig
from upspiral.trainer.base import StepMetrics, TrainerSetup
from upspiral.trainer.depth_first import is_deep
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.local import LocalTrainer
from upspiral.trainer.ranks import Ranks
from upspiral.weights.load import load_model
from upspiral.weights.names import hugging_face_views
from upspiral.weights.publication import PublisherSettings

ALL = tuple(FAMILIES)
MOE = ("qwen3-moe",)
TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-6
"""Absolute: a loss is what is left of advantages of both signs, each a few tenths."""


@dataclass(frozen=True)
class Case:
    """A number of ranks, started once, and the ways in which they divide which models."""

    kind: str
    ranks: int
    divisions: Sequence[tuple[Mapping[str, int], Sequence[str]]]
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the ranks' environment."""
    needs: str = "torch"
    """A package."""


WITHOUT_CUDA = {"CUDA_VISIBLE_DEVICES": ""}
"""Megatron takes it where there is some."""
MATRIX = [
    Case("fsdp", 1, [({}, ALL)]),
    Case("fsdp", 2, [({}, ALL), ({"tensor": 2}, ALL), ({"expert": 2}, MOE)]),
    Case("fsdp", 4, [({}, ALL), ({"tensor": 2}, ("qwen3",)), ({"expert": 2}, MOE)]),
    Case("deepspeed", 2, [({"zero_stage": stage}, ALL) for stage in (1, 2, 3)], needs="deepspeed"),
    Case("megatron", 1, [({}, ALL)], WITHOUT_CUDA, needs="megatron"),
    Case("megatron", 2, [({}, MOE), ({"tensor": 2}, ALL)], WITHOUT_CUDA, needs="megatron"),
]


@dataclass(frozen=True)
class Trained:
    """What a backend made of a family's steps."""

    metrics: Sequence[StepMetrics]
    begun: Mapping[str, torch.Tensor]
    """Its weights before them."""
    ended: Mapping[str, torch.Tensor]


STEPS = ((0.25, 1), (0.25, 2), (1.0, 1))
"""What the token weights are multiplied with, and the minibatches."""
MAX_GRAD_NORM = 0.6
CLIP = AlgorithmConfig(clip_low=0.0054, clip_high=0.0076)
"""Ratios are 1 in the first minibatch of a step, and differ from 1 by about 0.01 in the second; here none is so near to
a bound that rounding decides."""


def steps_of(family: str) -> list[list[ForestBatch]]:
    routes = (2, 3) if family == "qwen3-moe" else None
    return [
        [
            replace(batch, token_weight_M=batch.token_weight_M * share)
            for batch in policy_batches(seed, routes, experts=8, minibatches=minibatches)
        ]
        for seed, (share, minibatches) in enumerate(STEPS)
    ]


def setup_of(folder: Path, **division: Any) -> TrainerSetup:
    parallel = ParallelConfig(**division)
    config = TrainerConfig(lr=1e-4, weight_decay=0.1, max_grad_norm=MAX_GRAD_NORM, parallel=parallel)
    return TrainerSetup(folder, "float32", "cpu", config, CLIP, temperature=0.9)


@cache
def by_the_local_trainer(family: str, folder: Path) -> Trained:
    loaded = load_model(folder, dtype="float32", device="cpu")
    begun = {name: tensor.clone() for name, tensor in hugging_face_views(loaded.module).items()}
    setup = setup_of(folder)
    trainer = LocalTrainer(loaded.module, setup.trainer, setup.algorithm, temperature=setup.temperature)
    metrics = [trainer.step(batches) for batches in steps_of(family)]
    return Trained(metrics, begun, hugging_face_views(loaded.module))


def by_ranks(backend: Ranks, family: str, root: Path) -> Trained:
    begun = weights_in(backend.publish(PublisherSettings(root), 0).folder)
    metrics = [backend.step(batches) for batches in steps_of(family)]
    return Trained(metrics, begun, weights_in(backend.publish(PublisherSettings(root), 1).folder))


def weights_in(publication: Path) -> dict[str, torch.Tensor]:
    return hugging_face_views(load_model(publication, dtype="float32", device="cpu").module)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in ALL}
    for family, folder in folders.items():
        tiny_module(family).save_pretrained(folder)
    return folders


@pytest.mark.parametrize("family", ALL)
def test_the_steps_clip_some_tokens_and_some_gradients(family: str, models: dict[str, Path]) -> None:
    plain, clipping, last = by_the_local_trainer(family, models[family]).metrics
    assert plain.tokens["clip_fraction"] == last.tokens["clip_fraction"] == 0
    assert 0.05 < clipping.tokens["clip_fraction"] < 0.45
    assert max(plain.grad_norm, clipping.grad_norm) < 0.9 * MAX_GRAD_NORM and last.grad_norm > 1.4 * MAX_GRAD_NORM


def test_the_batches_are_what_the_matrix_promises() -> None:
    steps = steps_of("qwen3-moe")
    lanes = [[batch for batch in batches if batch.lane == number] for batches in steps for number in range(4)]
    assert all(lanes)
    assert any(is_deep(lane) for lane in lanes) and not all(is_deep(lane) for lane in lanes)
    assert all(any(batch.context for batch in batches) for batches in steps)
    assert all(batch.routes_TLK.shape[1:] == (2, 3) for batches in steps for batch in batches)


@pytest.mark.parametrize("case", MATRIX, ids=[f"{case.kind}-{case.ranks}" for case in MATRIX])
def test_backends_agree(case: Case, models: dict[str, Path], tmp_path: Path) -> None:
    if find_spec(case.needs) is None:
        pytest.skip(f"needs the [{case.needs}] extra")
    with closing(StartedRanks(case.ranks, tmp_path / "logs", case.variables)) as ranks:
        for division, families in case.divisions:
            for family in families:
                setup = setup_of(models[family], ranks=case.ranks, **division)
                ours = by_ranks(ranks.trainer(case.kind, setup), family, tmp_path / "published")
                shutil.rmtree(tmp_path / "published")
                assert_agree(ours, by_the_local_trainer(family, models[family]), f"{family} {dict(division)}")


def assert_agree(ours: Trained, theirs: Trained, where: str) -> None:
    assert ours.begun.keys() == theirs.begun.keys()
    assert all(torch.equal(ours.begun[name], theirs.begun[name]) for name in theirs.begun), where
    for number, (own, other) in enumerate(zip(ours.metrics, theirs.metrics, strict=True)):
        assert own.loss == pytest.approx(other.loss, rel=TOLERANCE, abs=LOSS_TOLERANCE), (where, number)
        assert own.grad_norm == pytest.approx(other.grad_norm, rel=TOLERANCE), (where, number)
        assert own.tokens == pytest.approx(other.tokens, rel=1e-4, abs=1e-5), (where, number)
        counts = [(each.unique_tokens, each.trained_tokens, each.skipped_steps, each.lr) for each in (own, other)]
        assert counts[0] == counts[1], (where, number)
    apart = {name: ours.ended[name].sub(tensor) for name, tensor in theirs.ended.items()}
    relative = {name: (apart[name].norm() / tensor.norm()).item() for name, tensor in theirs.ended.items()}
    moved = min((theirs.ended[name] - theirs.begun[name]).norm() / theirs.begun[name].norm() for name in apart)
    worst = max(relative, key=lambda name: relative[name])
    largest = max(each.abs().max().item() for each in apart.values())
    print(f"{where}: {relative[worst]:.1e} of {worst}, largest difference {largest:.1e}, all moved {moved:.1e} or more")
    assert moved > 10 * TOLERANCE, "nothing to compare"
    assert relative[worst] <= TOLERANCE, (where, worst)
