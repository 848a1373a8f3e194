"""The forward pass that gives a token the bits that the trainer will give it (`engine.exact`).

Everything but attention is computed row by row by the modules of the trainer's own model; attention by
`weights/exact.py`, which the trainer uses as well. What else is in the batch then changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from upspiral.engine.embedded.cache import SlotCache
from upspiral.engine.embedded.llama import LlamaForward, Rows
from upspiral.engine.embedded.sequence import Batch
from upspiral.weights.exact import at_least_some_rows, exact_attention, exact_chunk
from upspiral.weights.load import LoadedModel


class ExactForward(LlamaForward):
    def __init__(self, model: LoadedModel, cache: SlotCache) -> None:
        super().__init__(model, cache)
        self._scale = cache.keys_values.shape[-1] ** -0.5

    def refresh(self) -> None:
        """Nothing is held beside the trainer's weights."""

    def logits(self, batch: Batch) -> Tensor:
        """[S, V], in the dtype of the model, rows in the order of `batch.sampling`."""
        rows = self._rows(batch)
        decoder: Any = self._model.module.model
        hidden = at_least_some_rows(F.embedding(rows.ids_N, decoder.embed_tokens.weight))
        for layer, keys_values in zip(decoder.layers, self._cache.keys_values, strict=True):
            attended = self._mix(layer.self_attn, keys_values, layer.input_layernorm(hidden), rows)
            hidden = hidden + layer.self_attn.o_proj(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        sampled = at_least_some_rows(decoder.norm(hidden[rows.sampled_S]))
        return F.linear(sampled, self._model.module.lm_head.weight)[: len(rows.sampled_S)]

    def _mix(self, attention: Any, keys_values: Tensor, hidden: Tensor, rows: Rows) -> Tensor:
        count, width = len(rows.ids_N), keys_values.shape[-1]
        query, key, value = (
            getattr(attention, name)(hidden)[:count].unflatten(-1, (-1, width))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = (each * rows.cosines + _swapped(each) * rows.sines for each in (query, key))
        keys_values[rows.slots_N, :, rows.positions_N] = torch.cat([key, value], dim=1)
        parts = [self._decode_exactly(query[: rows.decoding], keys_values, rows)] if rows.decoding else []
        for chunk in rows.chunks:
            keys, values = keys_values[chunk.slot, :, : chunk.length].split(self._kv_heads)
            queries = query[chunk.begin : chunk.end].unflatten(1, (self._kv_heads, -1)).permute(1, 2, 0, 3)
            output, _ = exact_chunk(queries, keys, values, self._scale)
            parts.append(output.permute(2, 0, 1, 3).flatten(1))
        attended = torch.cat(parts).to(hidden.dtype)
        return F.pad(attended, (0, 0, 0, len(hidden) - count))

    def _decode_exactly(self, query: Tensor, keys_values: Tensor, rows: Rows) -> Tensor:
        """[decoding, H, D] -> [decoding, H * D]"""
        slots, positions = rows.slots_N[: rows.decoding], rows.positions_N[: rows.decoding]
        # Slots 0, 1, 2 ... need not be gathered.
        held = keys_values[: rows.decoding] if rows.decode_slots is None else keys_values[slots]
        keys, values = held[:, :, : int(positions.max()) + 1].split(self._kv_heads, dim=1)
        grouped = query.unflatten(1, (self._kv_heads, -1))
        seen = (positions + 1)[:, None, None].expand(*grouped.shape[:3])
        output, _ = exact_attention(grouped, keys, values, seen, self._scale)
        return output.flatten(1)


def _swapped(heads: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)
