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


class ParameterOptimizer(ABC):
    """One optimizer over all trainable parameters of a model, and the sums of their gradients.

    Gradients of microbatches are added in float32 whatever the parameters' precision, so that splitting a batch loses
    nothing. The gradient of a single one stays as it came until the update: of a few tokens, widening it would take as
    long as a quarter of the pass that made it.
    """

    def __init__(self, parameters: Iterable[Tensor], config: TrainerConfig) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self._parameters:
            raise ModelError("no parameter of the model is trainable; call requires_grad_(True) before training")
        self._config = config
        self._sums: list[Tensor | None] = [None] * len(self._parameters)
        self._scale = 1.0

    @torch.no_grad()
    def collect_gradients(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Moves what a backward pass left on the parameters (or on others in their place, in the same order) into the
        sums."""
        for number, parameter in enumerate(self._parameters if parameters is None else parameters):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            total = self._sums[number]
            self._sums[number] = gradient if total is None else _widened(total).add_(gradient)

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> float:
        """Lets the next step scale the collected gradients to a global norm of at most `max_norm`. Returns the norm
        before; when it is not finite nothing is scaled."""
        norms = [
            torch.linalg.vector_norm(gradient, dtype=_wide(gradient.dtype))
            for gradient in self._sums
            if gradient is not None
        ]
        if not norms:
            return 0.0
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        self._scale = max_norm / norm if max_norm < norm < float("inf") else 1.0
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with learning rate `lr`, in place; gradients are dropped."""
        self._update(lr)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self._sums = [None] * len(self._parameters)
        self._scale = 1.0
        for parameter in self._parameters:
            parameter.grad = None

    def _gradient(self, number: int) -> Tensor | None:
        """What is left of a parameter's sum after clipping, in float32 at least; once."""
        total, self._sums[number] = self._sums[number], None
        return total if total is None else _widened(total).mul_(self._scale)

    @abstractmethod
    def _update(self, lr: float) -> None:
        """From each `_gradient`; those that are None leave their parameter as it is."""

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

    def _update(self, lr: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for number, master in enumerate(self._masters):
            master.grad = self._gradient(number)
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
        kinds = ([x for x in self._masters if x.ndim > 1], [x for x in self._masters if x.ndim <= 1])
        groups = [{"params": kind, "weight_decay": weight_decay_of(kind[0], self._config)} for kind in kinds if kind]
        return torch.optim.AdamW(groups, lr=self._config.lr, betas=self._config.betas, fused=True)


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
    return parameter.detach().to(_wide(parameter.dtype))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(_wide(tensor.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
