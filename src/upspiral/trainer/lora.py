"""From the gradient of a merged weight to those of its factors.

W = base + s B A, so dA = s B' dW and dB = s dW A' (the chain rule). The forward pass knows nothing of factors, which
is what keeps it the engine's. A weight's gradient is handed on as soon as it is complete, so that never more than those
of one layer are alive.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from upspiral.weights.adapter import Adapter


def factors_behind(model: Any, adapter: Adapter) -> list[Tensor]:
    """Tensors on the storage of the adapter's factors that receive the gradients which backward passes of `model`,
    the adapted one or a lane's shell of it, would leave on the adapted weights. In the order of `adapter.factors`."""
    behind: list[Tensor] = []
    for each in adapter.weights:
        down_RI, up_OR = (factor.detach().requires_grad_() for factor in (each.down_RI, each.up_OR))
        weight = model.get_submodule(each.name).weight
        weight.register_post_accumulate_grad_hook(partial(_hand_on, down_RI, up_OR, adapter.scale))
        behind += [down_RI, up_OR]
    return behind


@torch.no_grad()
def _hand_on(down_RI: Tensor, up_OR: Tensor, scale: float, weight: Tensor) -> None:
    assert weight.grad is not None
    grad_OI, weight.grad = weight.grad.to(down_RI.dtype) * scale, None
    for factor, grad in ((down_RI, up_OR.mT @ grad_OI), (up_OR, grad_OI @ down_RI.mT)):
        factor.grad = grad if factor.grad is None else factor.grad.add_(grad)
