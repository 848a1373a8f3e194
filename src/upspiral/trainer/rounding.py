"""AdamW on bfloat16 weights without masters: each update is rounded up or down at random, right on average.

Rounding to the nearest would lose every update below half a unit in the last place. With the probability of going up
equal to the part that is cut off, the expected weight is the exact one (arXiv 2010.06192). What it costs against
masters is noise: a step to a part p between two neighbours deviates by sqrt(p (1 - p)) of their distance (one sigma).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from upspiral.config.models import TrainerConfig
from upspiral.errors import ModelError
from upspiral.trainer.gradients import GradientSums
from upspiral.trainer.optimizer import ParameterOptimizer, load_tensors, weight_decay_of

_BLOCK = 1 << 22
"""Weights that are wide at one time: 16 MB in float32. Part of which random number a weight meets."""
_LOW_BITS = 16
"""By which float32 is longer than bfloat16."""


class RoundingAdamW(ParameterOptimizer):
    """Keeps two float32 moments a weight and nothing else. Its random numbers start from torch's seed, one step after
    the other, and their state goes into the checkpoint."""

    def __init__(self, parameters: Iterable[Tensor], config: TrainerConfig) -> None:
        super().__init__(parameters, config)
        if any(parameter.dtype != torch.bfloat16 for parameter in self._parameters):
            raise ModelError(
                'trainer.master_weights = "none" needs all trained weights in bfloat16; set model.dtype = "bfloat16", '
                'or trainer.master_weights = "float32"'
            )
        self._first = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in self._parameters]
        self._second = [torch.zeros_like(moment) for moment in self._first]
        self._steps = [0] * len(self._parameters)
        self._generator = torch.Generator(self._parameters[0].device).manual_seed(torch.initial_seed())

    def _update(self, sums: GradientSums, lr: float) -> None:
        for number in range(len(self._parameters)):
            if (gradient := sums.take(number)) is not None:
                self._update_one(number, gradient, lr)

    def _update_one(self, number: int, gradient: Tensor, lr: float) -> None:
        parameter, (beta1, beta2) = self._parameters[number], self._config.betas
        for weights, *others in _blocks(parameter, gradient, self._first[number], self._second[number]):
            gradients, first, second = ([tensor] for tensor in others)
            wide = weights.to(torch.float32)
            step = torch.tensor(float(self._steps[number]), device=wide.device)  # adamw counts it up
            adamw(
                [wide], gradients, first, second, [], [step], fused=True, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=lr, eps=1e-8, weight_decay=weight_decay_of(parameter, self._config),
            )  # fmt: skip
            round_at_random(wide, weights, self._generator)
        self._steps[number] += 1

    @torch.no_grad()
    def forget_moments(self) -> None:
        for moment in (*self._first, *self._second):
            moment.zero_()
        self._steps = [0] * len(self._parameters)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": [parameter.detach() for parameter in self._parameters],
            "first": self._first,
            "second": self._second,
            "steps": list(self._steps),
            "random": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_tensors(self._parameters, state.get("weights", ()))
        load_tensors(self._first, state["first"])
        load_tensors(self._second, state["second"])
        self._steps = list(state["steps"])
        self._generator.set_state(state["random"])


def round_at_random(values: Tensor, target: Tensor, generator: torch.Generator) -> None:
    """Writes float32 `values` to bfloat16 `target`: each becomes one of its two neighbours, such that the expectation
    is the value; one that bfloat16 holds stays. `values` are rounded in place as well."""
    bits = values.view(torch.int32)
    # Four random numbers from one draw of 64 bits: a draw for each would take five times as long.
    draws = torch.empty(-(-len(bits) // 4), dtype=torch.int64, device=bits.device)
    noise = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: len(bits)]
    bits.add_(noise).add_(1 << (_LOW_BITS - 1)).bitwise_and_(-1 << _LOW_BITS)
    target.copy_(values)


def _blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """The same part of each tensor, flat, one after the other."""
    flat = [tensor.detach().view(-1) for tensor in tensors]
    return (list(parts) for parts in zip(*(tensor.split(_BLOCK) for tensor in flat), strict=True))
