"""Projections that read the same input, laid side by side so that one multiplication computes them all.

q, k and v (gate and up) stay parameters under their Hugging Face names, but their data are views of one tensor. Whoever
updates them in place (an optimizer, `load_state_dict`) updates the fused tensor: publication copies nothing. Replacing
the data (`module.to(...)`, `load_state_dict(assign=True)`) breaks the link; `FusedLayer.check` notices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from upspiral.errors import ModelError
from upspiral.weights.experts import has_experts
from upspiral.weights.families import CausalModule


@dataclass(frozen=True, slots=True, eq=False)
class FusedLayer:
    """The fused tensors of one decoder layer and the modules whose weights are views of them."""

    qkv: Tensor
    """[(query heads + 2 * key-value heads) * head size, hidden]"""
    gate_up: Tensor | None
    """[2 * intermediate, hidden]; None for a layer with experts, which transformers keeps as one tensor."""
    qkv_parts: tuple[nn.Linear, ...]
    gate_up_parts: tuple[nn.Linear, ...]

    def check(self, name: str) -> None:
        """Raises ModelError when a weight is no longer a view of its fused tensor. Costs a few pointer comparisons."""
        for fused, parts in ((self.qkv, self.qkv_parts), (self.gate_up, self.gate_up_parts)):
            address = 0 if fused is None else fused.data_ptr()
            for part in parts:
                if part.weight.data_ptr() != address:
                    raise ModelError(
                        f"{name}: a weight was replaced instead of updated in place, so the engine would go on with "
                        "the old one; use copy_, add_ or load_state_dict(assign=False), and .to() before fusing"
                    )
                address += part.weight.nbytes


def fuse_projections(model: CausalModule) -> tuple[FusedLayer, ...]:
    """Fuses every layer of the model in place and returns the fused tensors, one entry per layer.

    Values, names and the model's own forward pass stay as they were. Calling it again gives the same tensors.
    """
    fused = []
    layers: Any = model.model.layers
    for layer in layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        qkv_parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up_parts = () if has_experts(feed_forward) else (feed_forward.gate_proj, feed_forward.up_proj)
        gate_up = _fuse(gate_up_parts) if gate_up_parts else None
        fused.append(FusedLayer(_fuse(qkv_parts), gate_up, qkv_parts, gate_up_parts))
    return tuple(fused)


def _fuse(parts: tuple[nn.Linear, ...]) -> Tensor:
    weights = [part.weight.data for part in parts]
    rows = sum(len(weight) for weight in weights)
    if _are_fused(weights):
        return weights[0].as_strided((rows, weights[0].shape[1]), weights[0].stride())
    whole = torch.cat(weights)
    for part, view in zip(parts, whole.split([len(weight) for weight in weights]), strict=True):
        part.weight.data = view
    return whole


def _are_fused(weights: list[Tensor]) -> bool:
    same_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    return same_storage and all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(weights))
