"""From the gradient of a merged weight to those of its factors.

W = base + s B A, so dA = s B' dW and dB = s dW A' (the chain rule). The forward pass knows nothing of factors, which
is what keeps it the engine's. A weight's gradient is handed on as soon as it is complete, so that never more than those
of one layer are alive.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from upspiral.trainer.gradients import Source
from upspiral.weights.adapter import Adapter


def factors_behind(model: Any, adapter: Adapter) -> list[Source]:
    """The adapted weights of `model`, the adapted one or a lane's shell of it; sums are in the order of
    `adapter.factors`."""
    return [
        Source(
            model.get_submodule(each.name).weight,
            2 * number,
            partial(_by_chain_rule, each.down_RI, each.up_OR, adapter.scale),
        )
        for number, each in enumerate(adapter.weights)
    ]


def _by_chain_rule(down_RI: Tensor, up_OR: Tensor, scale: float, merged_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of A and B from that of the merged weight."""
    grad_OI = merged_OI.to(down_RI.dtype) * scale
    return up_OR.mT @ grad_OI, grad_OI @ down_RI.mT
