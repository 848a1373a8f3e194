"""AdamW on the part of every weight that lies on this rank, and the norm of the whole gradient.

torch's clipping and its optimizers take lists of tensors of one mesh; here are some of several. Locally all are plain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from upspiral.config.models import TrainerConfig
from upspiral.trainer.optimizer import weight_decay_of


class ShardedAdamW:
    """Updates the local parts in place; they are float32, so they are their own masters."""

    def __init__(self, parameters: Sequence[DTensor], config: TrainerConfig) -> None:
        self._config = config
        self._parameters = parameters
        self._weights = [local(parameter.detach()) for parameter in parameters]
        self.first = [torch.zeros_like(weight) for weight in self._weights]
        self.second = [torch.zeros_like(weight) for weight in self._weights]
        self.steps = 0

    @torch.no_grad()
    def step(self, scale: float, lr: float) -> None:
        """One update by the parameters' gradients, which are scaled in place."""
        (beta1, beta2), decays = self._config.betas, [weight_decay_of(each, self._config) for each in self._weights]
        for decay in sorted(set(decays)):
            chosen = [
                number for number, own in enumerate(decays)
                if own == decay and self._parameters[number].grad is not None and self._weights[number].numel()
            ]  # fmt: skip
            gradients = [gradient_of(self._parameters[number]).mul_(scale) for number in chosen]
            weights, first, second = ([each[n] for n in chosen] for each in (self._weights, self.first, self.second))
            counters = [torch.tensor(float(self.steps), device=weight.device) for weight in weights]
            adamw(
                weights, gradients, first, second, [], counters, fused=True, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=lr, eps=1e-8, weight_decay=decay,
            )  # fmt: skip
        self.steps += 1

    @torch.no_grad()
    def forget_moments(self) -> None:
        for moment in (*self.first, *self.second):
            moment.zero_()
        self.steps = 0


def local(tensor: Any) -> Tensor:
    """The part on this rank, in the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_of(parameter: Any) -> Tensor:
    return local(parameter.grad)


@torch.no_grad()
def global_norm(parameters: Sequence[DTensor]) -> float:
    """Of the gradients of all ranks, each element counted once however many ranks hold it."""
    given = [parameter for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient_of(parameter), dtype=torch.float32) for parameter in given]
    holders = torch.tensor([_holders(parameter) for parameter in given], dtype=torch.float64)
    squares = torch.stack(norms).double().square()
    total = (squares / holders.to(squares.device)).sum()
    distributed.all_reduce(total)
    return total.sqrt().item()


def _holders(parameter: DTensor) -> int:
    """How many ranks hold the same part."""
    mesh = parameter.device_mesh
    divided = [mesh.size(number) for number, place in enumerate(parameter.placements) if not place.is_replicate()]
    return distributed.get_world_size() // math.prod(divided)
