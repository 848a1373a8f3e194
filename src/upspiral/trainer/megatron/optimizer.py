"""AdamW whose masters and moments are divided over the ranks with different data, a whole parameter to each (ZeRO-1).

Gradients are added over these ranks, never averaged: token weights have their denominators already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from upspiral.config.models import TrainerConfig
from upspiral.trainer.fsdp.optimizer import ShardedAdamW
from upspiral.trainer.gradients import GradientSums, wide
from upspiral.trainer.rank_backend import clip_scale


class DividedAdamW:
    """Updates the parameters of one rank of a Megatron model, in place, by the gradients of all ranks."""

    def __init__(
        self, parameters: Mapping[str, Tensor], config: TrainerConfig, *, data: Any, tensor: Any, divided: set[str]
    ) -> None:
        """`parameters`: by Megatron's names, in the order of their sums of gradients. `data`, `tensor`: the groups of
        this rank. `divided`: the names of which every rank of `tensor` has another part; of the others all have the
        same."""
        self._parameters, self._config, self._data, self._tensor = parameters, config, data, tensor
        self._divided = divided
        self._owners = _owners(list(parameters.values()), data.size())
        owned = zip(parameters.items(), self._owners, strict=True)
        self.names = [name for (name, _), owner in owned if owner == data.rank()]
        """Of the parameters whose masters and moments are on this rank."""
        self.masters = [parameters[name].detach().to(wide(parameters[name].dtype)) for name in self.names]
        self.adamw: Any = ShardedAdamW(self.masters, config)  # pyright: ignore[reportArgumentType]  # plain tensors

    @torch.no_grad()
    def update(self, sums: GradientSums, lr: float) -> float:
        """One update, unless the gradient is not finite. Uses up the sums; returns the norm of the whole gradient,
        before clipping."""
        gradients = self._add_up(sums)
        device = next(iter(self._parameters.values())).device
        squares = torch.zeros((), dtype=torch.float64, device=device)
        for name, gradient in gradients.items():
            if name in self._divided or self._tensor.rank() == 0:
                squares += torch.linalg.vector_norm(gradient).double().square()
        distributed.all_reduce(squares)
        norm = squares.sqrt().item()
        if math.isfinite(norm):
            for master, name in zip(self.masters, self.names, strict=True):
                master.grad = gradients.pop(name)
            self.adamw.step(clip_scale(norm, self._config.max_grad_norm), lr)
            for master in self.masters:
                master.grad = None
            self.spread()
        return norm

    @torch.no_grad()
    def spread(self) -> None:
        """The owners' masters become the parameters of all ranks."""
        for name, master in zip(self.names, self.masters, strict=True):
            self._parameters[name].copy_(master)
        for parameter, owner in zip(self._parameters.values(), self._owners, strict=True):
            distributed.broadcast(parameter.data, group=self._data, group_src=owner)

    def _add_up(self, sums: GradientSums) -> dict[str, Tensor]:
        """Of the parameters that are this rank's own."""
        kept: dict[str, Tensor] = {}
        for number, (name, parameter) in enumerate(self._parameters.items()):
            total = sums.take(number)
            if total is None:  # no token went to this expert; it is on its way down all the same
                total = torch.zeros_like(parameter, dtype=wide(parameter.dtype))
            total = total.contiguous()
            if _sees_own_heads(name):
                distributed.all_reduce(total, group=self._tensor)
            distributed.reduce(total, group=self._data, group_dst=self._owners[number])
            if self._owners[number] == self._data.rank():
                kept[name] = total
        return kept


def _owners(parameters: list[Tensor], places: int) -> list[int]:
    """The place of each parameter's owner, such that all own about as much; the same on all tensor-parallel ranks."""
    owned, owners = [0] * places, [0] * len(parameters)
    for number in sorted(range(len(parameters)), key=lambda number: -parameters[number].numel()):
        owners[number] = min(range(places), key=lambda place: owned[place])
        owned[owners[number]] += parameters[number].numel()
    return owners


def _sees_own_heads(name: str) -> bool:
    """The norms of queries and keys are the same on all tensor-parallel ranks, and each uses them on its heads only."""
    return name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
