"""Attention over slots: of decoding rows, one query a slot, and of chunks of prompts.

Shapes: B decoding rows, K key heads, G query heads that share one, H = K * G, T positions, D head size, N rows of a
chunk. Keys and values are views of the cache, which the compiled kernel reads in place; torch gathers what decodes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from upspiral.kernel.path_attention import PathAttention, Plan, Segment, path_attention
from upspiral.weights.exact import exact_attention, exact_chunk


class SlotAttention(Protocol):
    """`decode` is given keys and values [slots, K, T, D], slots and lengths [B]: row b sees the first `lengths[b]`
    positions of its slot. `chunk` is given those of one slot, [K, T, D], of which the chunk's rows are the last."""

    def decode(
        self, queries_BHD: Tensor, keys_values: tuple[Tensor, Tensor], slots_B: Tensor, lengths_B: Tensor
    ) -> Tensor: ...

    def chunk(self, queries_NHD: Tensor, keys_KTD: Tensor, values_KTD: Tensor) -> Tensor: ...


def slot_attention(queries_HTD: Tensor, keys_KTD: Tensor, *, exact: bool) -> SlotAttention:
    """The fastest for such heads; `exact`: a row gets the same bits whatever is computed beside it."""
    compiled = path_attention() if PathAttention.takes(queries_HTD, keys_KTD) else None
    if compiled is not None:
        return CompiledAttention(compiled)
    return ExactTorchAttention() if exact else TorchAttention()


class CompiledAttention:
    """On CPU, and exact; see kernel/path_attention.py."""

    def __init__(self, compiled: PathAttention) -> None:
        self._compiled = compiled

    def decode(
        self, queries_BHD: Tensor, keys_values: tuple[Tensor, Tensor], slots_B: Tensor, lengths_B: Tensor
    ) -> Tensor:
        scale = queries_BHD.shape[-1] ** -0.5
        return self._compiled.decode(queries_BHD, keys_values, slots_B, lengths_B, scale)

    def chunk(self, queries_NHD: Tensor, keys_KTD: Tensor, values_KTD: Tensor) -> Tensor:
        count, heads, size = queries_NHD.shape
        plan = Plan.of([Segment(0, count, [(0, keys_KTD.shape[1])])], heads // len(keys_KTD))
        output, _ = self._compiled.forward(queries_NHD.transpose(0, 1), keys_KTD, values_KTD, plan, size**-0.5)
        return output.transpose(0, 1)


class TorchAttention:
    """By scaled_dot_product_attention, on any device."""

    def decode(
        self, queries_BHD: Tensor, keys_values: tuple[Tensor, Tensor], slots_B: Tensor, lengths_B: Tensor
    ) -> Tensor:
        longest = int(lengths_B.max())
        keys, values = (each[slots_B, :, :longest] for each in keys_values)
        mask = torch.arange(longest, device=lengths_B.device) < lengths_B[:, None, None, None]
        grouped = queries_BHD.unflatten(1, (keys.shape[1], -1))
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1, 2)

    def chunk(self, queries_NHD: Tensor, keys_KTD: Tensor, values_KTD: Tensor) -> Tensor:
        count, length = len(queries_NHD), keys_KTD.shape[1]
        mask = torch.ones(count, length, dtype=torch.bool, device=keys_KTD.device).tril(length - count)
        queries = queries_NHD.transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(
            queries, keys_KTD[None], values_KTD[None], attn_mask=mask, enable_gqa=True
        )
        return attended[0].transpose(0, 1)


class ExactTorchAttention:
    """Exact by torch, where nothing can be compiled; see weights/exact.py."""

    def decode(
        self, queries_BHD: Tensor, keys_values: tuple[Tensor, Tensor], slots_B: Tensor, lengths_B: Tensor
    ) -> Tensor:
        keys, values = (each[slots_B, :, : int(lengths_B.max())] for each in keys_values)
        grouped = queries_BHD.unflatten(1, (keys.shape[1], -1))
        seen = lengths_B[:, None, None].expand(*grouped.shape[:3])
        output, _ = exact_attention(grouped, keys, values, seen, queries_BHD.shape[-1] ** -0.5)
        return output.flatten(1, 2).to(queries_BHD.dtype)

    def chunk(self, queries_NHD: Tensor, keys_KTD: Tensor, values_KTD: Tensor) -> Tensor:
        queries = queries_NHD.unflatten(1, (len(keys_KTD), -1)).permute(1, 2, 0, 3)
        output, _ = exact_chunk(queries, keys_KTD, values_KTD, queries_NHD.shape[-1] ** -0.5)
        return output.permute(2, 0, 1, 3).flatten(1, 2).to(queries_NHD.dtype)
