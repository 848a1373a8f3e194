"""AdamW that keeps float32 master weights beside lower-precision parameters and updates those in place.

In bfloat16 a weight near 1 cannot take a step below 0.004: at RL's learning rates most updates would be lost. The
master copy takes them all, and the parameter is its rounding. `rounding.py` does without the copy. Parameters are
written with `copy_` and never replaced: the embedded engine samples from the same storage, of which some are views.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from upspiral.config.models import TrainerConfig
from upspiral.errors import ModelError, StoreError
from upspiral.trainer.gradients import GradientSums, wide


class ParameterOptimizer(ABC):
    """One optimizer over all that is trained of a model."""

    def __init__(self, parameters: Iterable[Tensor], config: TrainerConfig) -> None:
        """`parameters`: in the order of their sums of gradients. Raises ModelError when there are none."""
        self._parameters = list(parameters)
        if not self._parameters:
            raise ModelError("no parameter of the model is trainable; call requires_grad_(True) before training")
        self._config = config

    @torch.no_grad()
    def step(self, sums: GradientSums, lr: float) -> None:
        """One update with learning rate `lr`, in place; the sums are used up. Where there is none, the parameter stays
        as it is."""
        self._update(sums, lr)
        sums.drop()

    @abstractmethod
    def _update(self, sums: GradientSums, lr: float) -> None: ...

    @abstractmethod
    def forget_moments(self) -> None:
        """Starts AdamW anew on the weights as they are: what it knew of one objective misleads it on the next."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Weights and moments; views of the live tensors, so save or copy them before the next step."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores weights and moments, in place. StoreError when another model or another kind of optimizer wrote
        them."""


class MasterAdamW(ParameterOptimizer):
    """Parameters in float32 or wider are their own masters."""

    def __init__(self, parameters: Iterable[Tensor], config: TrainerConfig) -> None:
        super().__init__(parameters, config)
        self._masters = [_master_of(parameter) for parameter in self._parameters]
        self._adamw = self._fresh()

    def _update(self, sums: GradientSums, lr: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for number, master in enumerate(self._masters):
            master.grad = sums.take(number)
        self._adamw.step()
        for master in self._masters:
            master.grad = None
        self._publish()

    def forget_moments(self) -> None:
        self._adamw = self._fresh()

    def state_dict(self) -> dict[str, Any]:
        return {"masters": self._masters, "adamw": self._adamw.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_tensors(self._masters, state.get("masters", ()))
        self._adamw = self._fresh()
        self._adamw.load_state_dict(state["adamw"])
        self._publish()

    def _publish(self) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter.data_ptr() != master.data_ptr():
                parameter.copy_(master)

    def _fresh(self) -> torch.optim.AdamW:
        return adamw(self._masters, self._config)


def adamw(parameters: Iterable[Tensor], config: TrainerConfig) -> torch.optim.AdamW:
    """torch's, with the decay that each parameter is to have."""
    own = list(parameters)
    kinds = ([x for x in own if x.ndim > 1], [x for x in own if x.ndim <= 1])
    groups = [{"params": kind, "weight_decay": weight_decay_of(kind[0], config)} for kind in kinds if kind]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: TrainerConfig, steps_done: int) -> float:
    """Of the RL step after `steps_done` of them: it rises linearly over the steps of warm-up."""
    return config.lr * min(1.0, (steps_done + 1) / (config.lr_warmup_steps + 1))


def weight_decay_of(parameter: Tensor, config: TrainerConfig) -> float:
    """Norms and biases are not decayed, as is usual: they set scales, not features."""
    return config.weight_decay if parameter.ndim > 1 else 0.0


def load_tensors(own: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Copies the saved over our own. StoreError where they are not the same in number, shape and precision."""
    if [(x.shape, x.dtype) for x in saved] != [(x.shape, x.dtype) for x in own]:
        raise StoreError(
            "the checkpoint holds weights of other shapes or precision than this trainer's; resume with its own model, "
            "trainer.lora and trainer.master_weights"
        )
    for tensor, other in zip(own, saved, strict=True):
        tensor.copy_(other)


def _master_of(parameter: Tensor) -> Tensor:
    """The same storage where the parameter is wide enough: updating the master updates the parameter."""
    return parameter.detach().to(wide(parameter.dtype))
