"""AdamW that keeps float32 master weights beside lower-precision parameters and updates those in place.

In bfloat16 a weight near 1 cannot take a step below 0.004: at RL's learning rates most updates would be lost. The
master copy takes them all, and the parameter is its rounding. Parameters are written with `copy_` and never replaced:
the embedded engine samples from the same storage, of which some parameters are views.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from upspiral.config.models import TrainerConfig
from upspiral.errors import ModelError, StoreError


class MasterAdamW:
    """One optimizer over all trainable parameters of a model. Parameters in float32 or wider are their own masters."""

    def __init__(self, parameters: Iterable[Tensor], config: TrainerConfig) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self._parameters:
            raise ModelError("no parameter of the model is trainable; call requires_grad_(True) before training")
        self._masters = [_master_of(parameter) for parameter in self._parameters]
        self._config = config
        self._adamw = self._fresh()

    @torch.no_grad()
    def collect_gradients(self, parameters: Sequence[Tensor] | None = None) -> None:
        """Moves what a backward pass left on the parameters (or on others in their place, in the same order) into the
        masters' sums. Gradients of microbatches are added in float32 whatever the parameters' precision, so that
        splitting a batch loses nothing."""
        for parameter, master in zip(parameters or self._parameters, self._masters, strict=True):
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.to(master.dtype)
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> float:
        """Scales the collected gradients to a global norm of at most `max_norm`. Returns the norm before; when it is
        not finite nothing is scaled."""
        gradients = [master.grad for master in self._masters if master.grad is not None]
        if not gradients:
            return 0.0
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if max_norm < norm < float("inf"):
            for gradient in gradients:
                gradient.mul_(max_norm / norm)
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with learning rate `lr`; the parameters follow their masters; gradients are dropped."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.drop_gradients()
        self._publish()

    def drop_gradients(self) -> None:
        for tensor in (*self._masters, *self._parameters):
            tensor.grad = None

    def forget_moments(self) -> None:
        """Starts AdamW anew on the weights as they are: what it knew of one objective misleads it on the next."""
        self._adamw = self._fresh()

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments; views of the live tensors, so save or copy them before the next step."""
        return {"masters": self._masters, "adamw": self._adamw.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores masters, moments and thereby the parameters, in place. StoreError when another model wrote it."""
        masters: Sequence[Tensor] = state["masters"]
        if [tuple(x.shape) for x in masters] != [tuple(x.shape) for x in self._masters]:
            raise StoreError("the checkpoint holds weights of other shapes than this model; resume with its own model")
        for master, saved in zip(self._masters, masters, strict=True):
            master.copy_(saved)
        self._adamw = self._fresh()
        self._adamw.load_state_dict(state["adamw"])
        self._publish()

    def _publish(self) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if parameter.data_ptr() != master.data_ptr():
                parameter.copy_(master)

    def _fresh(self) -> torch.optim.AdamW:
        # Norms and biases are not decayed, as is usual: they set scales, not features.
        groups = [
            {"params": [x for x in self._masters if x.ndim > 1], "weight_decay": self._config.weight_decay},
            {"params": [x for x in self._masters if x.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self._config.lr, betas=self._config.betas, fused=True)


def _master_of(parameter: Tensor) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter.detach()  # the same storage: updating the master updates the parameter
    return parameter.detach().to(torch.float32, copy=True)
