"""A dense decoder layer without its attention, as trainer and exact engine both compute it.

What is before attention and what is after it, each a few products and what `rows.cpp` does between them. A row's
results do not depend, to the bit, on the rows beside it, as long as there are LEAST_ROWS of them (`weights/exact.py`).

Shapes: T tokens, W hidden width, H query heads, K key heads, D head width, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upspiral.kernel.path_attention import path_attention
from upspiral.kernel.product import multiply
from upspiral.kernel.rows import Rows, rows
from upspiral.weights.fused import FusedLayer

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of the rows' positions, each [T, D] without gaps."""


@dataclass(frozen=True, slots=True, eq=False)
class Projected:
    """What a layer's attention is given, and what the gradients need of how it came about."""

    query_THD: Tensor
    key_TKD: Tensor
    value_TKD: Tensor
    scales: Tensor
    head_scales: tuple[Tensor, ...] = ()
    """Of the norms of queries and keys, where there are some."""
    heads: Tensor | None = None
    """[T,H+2K,D] before those norms."""


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A layer's output [T,W], and what the gradients need of how it came about."""

    hidden: Tensor
    middle: Tensor
    """[T,W] after attention was added."""
    scales: Tensor
    gates: Tensor
    """[T,2F]"""


Product = Callable[[Tensor], Tensor]
"""Rows [T, in] times a weight, to [T, out]."""


def plain_product(weight: Tensor) -> Product:
    """With the weight as it is when it is called."""
    return lambda rows: multiply(rows, weight)


class DenseLayer:
    """A layer of transformers' Llama or Qwen3 modules. It computes with their parameters, which others update."""

    def __init__(self, module: Any, fused: FusedLayer, compiled: Rows, product: Callable[[Tensor], Product]) -> None:
        assert fused.gate_up is not None
        attention = module.self_attn
        self.attention, self.fused, self.rows = attention, fused, compiled
        self.qkv, self.gate_up = fused.qkv, fused.gate_up
        self.output, self.down = attention.o_proj.weight, module.mlp.down_proj.weight
        self.products = tuple(product(weight) for weight in (self.qkv, self.output, self.gate_up, self.down))
        """By queries, keys and values; output; gate and up; down."""
        self.attention_norm = module.input_layernorm.weight
        self.feed_forward_norm = module.post_attention_layernorm.weight
        self.head_norms = tuple(
            getattr(attention, name).weight for name in ("q_norm", "k_norm") if hasattr(attention, name)
        )
        self.epsilon = module.input_layernorm.variance_epsilon
        self.width, self.scale = attention.head_dim, attention.scaling
        sizes = [len(part.weight) // self.width for part in fused.qkv_parts]
        self.query_heads, self.key_heads = sizes[:2]

    def project(self, hidden_TW: Tensor, angles: Angles) -> Projected:
        normed, scales = self.rows.norm(hidden_TW[:, None], self.attention_norm, self.epsilon)
        heads = self.products[0](normed[:, 0]).unflatten(1, (-1, self.width))
        query, key, value = heads.split([self.query_heads, self.key_heads, self.key_heads], dim=1)
        if not self.head_norms:
            rotated = heads[:, : self.query_heads + self.key_heads]
            self.rows.rotate(rotated, angles, rotated)
            return Projected(query, key, value, scales)
        pairs = zip((query, key), self.head_norms, strict=True)
        (query, query_scales), (key, key_scales) = (self.rows.norm(part, norm, self.epsilon) for part, norm in pairs)
        for part in (query, key):
            self.rows.rotate(part, angles, part)
        return Projected(query, key, value, scales, (query_scales, key_scales), heads)

    def finish(self, hidden_TW: Tensor, attended: Tensor) -> Finished:
        """`attended`: [T,H*D]"""
        _, output, gate_up, down = self.products
        middle = hidden_TW + output(attended)
        normed, scales = self.rows.norm(middle[:, None], self.feed_forward_norm, self.epsilon)
        gates = gate_up(normed[:, 0])
        return Finished(middle + down(self.rows.gate(gates)), middle, scales, gates)


def dense_layers(
    module: Any, fused: tuple[FusedLayer, ...], product: Callable[[Tensor], Product] = plain_product
) -> list[DenseLayer] | None:
    """The layers of a causal language model whose projections are `fused`; None where the compiled code does not run or
    does not compute what the model's own modules do. `product` makes of a weight how it is multiplied with."""
    compiled = rows() if path_attention() is not None else None
    if compiled is None or not all(_fits(layer, each) for layer, each in zip(module.model.layers, fused, strict=True)):
        return None
    return [DenseLayer(layer, each, compiled, product) for layer, each in zip(module.model.layers, fused, strict=True)]


def _fits(layer: Any, fused: FusedLayer) -> bool:
    if fused.gate_up is None or layer.mlp.config.hidden_act != "silu":
        return False
    linear = (*fused.qkv_parts, *fused.gate_up_parts, layer.self_attn.o_proj, layer.mlp.down_proj)
    plain = all(type(part) is nn.Linear and part.bias is None for part in linear)
    parameters = list(layer.parameters())
    known = all(x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu" for x in parameters)
    widths = layer.self_attn.head_dim in range(32, 257, 32) and all(size % 16 == 0 for size in linear[-1].weight.shape)
    return plain and known and widths and len({x.dtype for x in parameters}) == 1
