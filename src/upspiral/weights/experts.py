"""Mixtures of experts: which layers have one, and a computation of it that gives a token the same bits in any company.

Kernels for experts take all rows of one expert at once, so how many rows there are, and with them the bits, depends on
the rest of the batch. Here an expert computes at least LEAST_ROWS rows, as `weights/exact.py` does elsewhere, and the
outputs of a token's experts are added in the order of its own choice.

Shapes: T tokens, K experts of a token, C hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from upspiral.weights.exact import at_least_some_rows

EXACT_EXPERTS_NAME = "upspiral_exact"


def has_experts(block: Any) -> bool:
    """Whether a layer's feed-forward block routes its tokens to experts."""
    return hasattr(block, "experts")


def expert_layers(model: Any) -> list[Any]:
    """The layers with experts of a causal language model, in order; none of a module that is not transformers'."""
    return [layer for layer in getattr(model.get_decoder(), "layers", ()) if has_experts(layer.mlp)]


def exact_experts(experts: Any, hidden_TC: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, C]: the weighted sum of what each token's experts make of it, added up in float32 at least.

    `experts`: transformers' module, with `gate_up_proj` [experts, 2 * width, C] and `down_proj` [experts, C, width].
    """
    top_k = chosen_TK.shape[1]
    order = chosen_TK.flatten().argsort(stable=True)
    counts = chosen_TK.flatten().bincount(minlength=len(experts.gate_up_proj)).tolist()
    # Parts of a parameter by unbind: an index each would make a gradient of the whole for each expert.
    work = zip(
        hidden_TC[order // top_k].split(counts), experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True
    )
    parts = [_one_expert(experts.act_fn, *each) for each in work if len(each[0])]
    outputs_TKC = torch.cat(parts)[order.argsort()].unflatten(0, (-1, top_k))
    wide = torch.float64 if hidden_TC.dtype == torch.float64 else torch.float32
    total, *others = (outputs_TKC.to(wide) * weights_TK[..., None].to(wide)).unbind(1)
    for other in others:
        total = total + other
    return total.to(hidden_TC.dtype)


@contextmanager
def exact_experts_in(model: Any) -> Iterator[None]:
    """Within it, a transformers model computes its experts by `exact_experts`, if it has some."""
    if not expert_layers(model):
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(EXACT_EXPERTS_NAME, exact_experts)
    before = model.config._experts_implementation
    model.set_experts_implementation(EXACT_EXPERTS_NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _one_expert(activation: Any, rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(at_least_some_rows(rows), gate_up).chunk(2, dim=-1)
    return F.linear(activation(gate) * up, down)[: len(rows)]
