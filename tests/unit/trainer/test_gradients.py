"""Gradients go into the sums while backward passes run: the bits of sums in the order of lanes, whatever is first."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch
from torch import Tensor, nn

from tests.fixtures.demonstrations import demonstration_graph
from tests.fixtures.tiny_modules import tiny_module
from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.gradients import GradientSums, whole_weights
from upspiral.trainer.lanes import Lanes
from upspiral.trainer.local import LocalTrainer

DEPTH = 6


class Tower(nn.Module):
    """Of its weights the odd ones are left out on request, as experts are that nobody was routed to."""

    def __init__(self, dtype: torch.dtype, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.floors = nn.ParameterList([nn.Parameter(torch.randn(width, width).to(dtype)) for _ in range(DEPTH)])

    def forward(self, rows: Tensor, *, skips: bool = False) -> Tensor:
        for number, floor in enumerate(self.floors):
            rows = rows if skips and number % 2 else torch.tanh(rows @ floor)
        return rows


def inputs(dtype: torch.dtype, count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 16).to(dtype) for _ in range(count)]


def sums_of_lanes(lanes: Lanes, rows: list[Tensor], *, late: int = -1, skips: int = -1) -> list[Tensor | None]:
    """Two rounds; lane `late` begins after the others, lane `skips` leaves weights out."""
    sums = GradientSums([whole_weights(model) for model in lanes.models])
    for _ in range(2):
        with sums.collected(range(len(rows))) as turns:

            def work(model: Any, number: int, turns: Any = turns) -> None:
                with turns.taken_by(number):
                    time.sleep(0.05 * (number == late))
                    model(rows[number], skips=number == skips).sum().backward()

            lanes.run(work, range(len(rows)))
    return [sums.take(number) for number in range(DEPTH)]


def sums_afterwards(lanes: Lanes, rows: list[Tensor], *, skips: int = -1) -> list[Tensor | None]:
    """One lane after the other, added up when all are done."""
    own: list[list[Tensor | None]] = []
    for number, each in enumerate(rows):
        model = lanes.models[number]
        model(each, skips=number == skips).sum().backward()
        own.append([weight.grad for weight in model.parameters()])
        model.zero_grad()
    sums = GradientSums()
    for gradients in own * 2:
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                sums.add(number, gradient.clone())
    return [sums.take(number) for number in range(DEPTH)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("skips", [-1, 0, 1])
def test_sums_are_those_in_the_order_of_lanes(dtype: torch.dtype, late: int, skips: int) -> None:
    lanes, rows = Lanes(Tower(dtype), 3), inputs(dtype, 3)
    found = sums_of_lanes(lanes, rows, late=late, skips=skips)
    expected = sums_afterwards(lanes, rows, skips=skips)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(weight.grad is None for model in lanes.models for weight in model.parameters())


def test_a_single_gradient_stays_as_it_came() -> None:
    sums, gradient = GradientSums(), torch.full((4,), 2.0, dtype=torch.bfloat16)
    sums.add(0, gradient)
    assert sums.clip(2.0) == 4.0
    taken = sums.take(0)
    assert taken is not None and taken.dtype == torch.float32 and taken.tolist() == [1.0] * 4
    assert gradient.tolist() == [2.0] * 4
    assert sums.take(0) is None


def test_nobody_waits_for_a_lane_that_failed_and_nothing_is_left() -> None:
    lanes, rows = Lanes(Tower(torch.float32), 2), inputs(torch.float32, 2)
    sums, in_backward = GradientSums([whole_weights(model) for model in lanes.models]), threading.Event()

    def work(model: Any, number: int) -> None:
        with turns.taken_by(number):
            made = model(rows[number])
            if number == 0:
                assert in_backward.wait(30)
                raise ValueError("lane 0")
            made.register_hook(lambda grad: in_backward.set())
            made.sum().backward()

    with pytest.raises(ValueError, match="lane 0"), sums.collected([0, 1]) as turns:
        lanes.run(work, range(2))
    assert [sums.take(number) for number in range(DEPTH)] == [None] * DEPTH
    lanes.models[0](rows[0]).sum().backward()
    assert all(weight.grad is not None for weight in lanes.models[0].parameters()), "hooks must be gone"


def demonstrations(lanes: int) -> list[ForestBatch]:
    graphs = [demonstration_graph(str(i), [([1, 2, 3 + i], [9, 8, 7, i] * 15)]) for i in range(12)]
    return pack(list(zip(graphs, sft_credit(graphs), strict=True)), tokens_per_microbatch=150, lanes=lanes)


def learner(module: Any, lanes: int) -> LocalTrainer:
    return LocalTrainer(module, TrainerConfig(lr=1e-2), AlgorithmConfig(), temperature=1.0, lanes=lanes)


@pytest.mark.parametrize("number", [0, 1])
def test_a_step_that_fails_leaves_no_gradients_to_the_next(number: int) -> None:
    ends = []
    for fails in (True, False):
        module = tiny_module("llama")
        trainer, batches = learner(module, 2), demonstrations(2)
        if fails:
            broken = demonstrations(2)
            [*_, last] = [batch for batch in broken if batch.lane == number]
            last.token_ids_T[:] = 10**6
            with pytest.raises(IndexError):
                trainer.step(broken, kind="sft")
        trainer.step(batches, kind="sft")
        ends.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_weights_hold_no_gradients_while_a_backward_pass_goes_on() -> None:
    lanes, rows = Lanes(Tower(torch.bfloat16), 3), inputs(torch.bfloat16, 3)
    sums, held = GradientSums([whole_weights(model) for model in lanes.models]), list[int]()
    weights = [weight for model in lanes.models for weight in model.parameters()]

    def work(model: Any, number: int) -> None:
        with turns.taken_by(number):
            each = rows[number].requires_grad_()
            each.register_hook(lambda grad: held.append(sum(weight.grad is not None for weight in weights)))
            model(each).sum().backward()

    with sums.collected(range(3)) as turns:
        lanes.run(work, range(3))
    assert len(held) == 3 and max(held) <= 2, "one on its way in each other lane"
