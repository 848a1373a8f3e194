"""The forward pass of the Llama family over a packed batch, with keys and values in slots.

Shapes: N rows (one token each), S rows that are sampled, H query heads, K key-value heads, G = H / K, D head size,
V vocabulary. All rows share the multiplications; only attention treats decoding rows and prompt chunks apart. Weights
are read from the trainer's module at every step, so an in-place update needs no publication of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from upspiral.engine.embedded.cache import SlotCache
from upspiral.engine.embedded.sequence import Batch
from upspiral.weights.load import LoadedModel


@dataclass(frozen=True, slots=True)
class _ChunkRows:
    """Rows begin .. end of the batch are positions .. `length` of one slot's prompt."""

    begin: int
    end: int
    slot: int
    length: int
    mask: Tensor | None
    """[rows, length], additive; None for a chunk that starts at 0 and is plainly causal."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """A batch as tensors. The first `decoding` rows decode."""

    ids_N: Tensor
    positions_N: Tensor
    slots_N: Tensor
    cosines: Tensor
    """[N, 1, D]"""
    sines: Tensor
    decoding: int
    decode_slots: Tensor | None
    """[decoding]; None when they are exactly 0, 1, 2 ..."""
    decode_mask: Tensor
    """[slots 0 .. highest decoding, 1, 1, longest], additive"""
    chunks: tuple[_ChunkRows, ...]
    sampled_S: Tensor


class LlamaForward:
    """Computes the logits of a batch and writes its keys and values into the cache."""

    def __init__(self, model: LoadedModel, cache: SlotCache):
        config = model.config
        self._model, self._cache = model, cache
        self._heads = config.num_attention_heads
        self._kv_heads = cache.keys_values.shape[2] // 2
        self._epsilon = config.rms_norm_eps
        self._cosines, self._sines = _rotary_table(model, cache.ids.shape[1])

    def logits(self, batch: Batch) -> Tensor:
        """[S, V], in the dtype of the model, rows in the order of `batch.sampling`."""
        rows = self._rows(batch)
        decoder = self._model.module.model
        hidden = F.embedding(rows.ids_N, decoder.embed_tokens.weight)
        for index in range(len(self._model.layers)):
            hidden = hidden + self._attend(index, hidden, rows)
            hidden = hidden + self._feed_forward(index, hidden)
        hidden = self._normalize(hidden[rows.sampled_S], decoder.norm.weight)
        return F.linear(hidden, self._model.module.lm_head.weight)

    def _attend(self, index: int, hidden: Tensor, rows: _Rows) -> Tensor:
        layer = self._model.module.model.layers[index]
        keys_values = self._cache.keys_values[index]
        query_heads, key_heads = self._heads, self._kv_heads
        qkv = F.linear(self._normalize(hidden, layer.input_layernorm.weight), self._model.layers[index].qkv)
        qkv = qkv.view(len(hidden), query_heads + 2 * key_heads, -1)
        self._rotate(qkv[:, : query_heads + key_heads], rows)
        keys_values[rows.slots_N, :, rows.positions_N] = qkv[:, query_heads:]
        queries = qkv[:, :query_heads]
        parts = []
        if rows.decoding:
            parts.append(self._decode(queries[: rows.decoding], keys_values, rows))
        for chunk in rows.chunks:
            parts.append(self._prefill(queries[chunk.begin : chunk.end], keys_values[chunk.slot], chunk))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return F.linear(attended, layer.self_attn.o_proj.weight)

    def _decode(self, queries: Tensor, keys_values: Tensor, rows: _Rows) -> Tensor:
        """One call over the slots as they lie, without gathering. [decoding, H, D] -> [decoding, H * D]

        The G queries that share a key-value head stand where a query sequence would.
        """
        span, length = rows.decode_mask.shape[0], rows.decode_mask.shape[-1]
        if rows.decode_slots is not None:
            queries = queries.new_zeros(span, *queries.shape[1:]).index_copy_(0, rows.decode_slots, queries)
        queries = queries.reshape(span, self._kv_heads, self._heads // self._kv_heads, -1)
        keys, values = keys_values[:span, : self._kv_heads, :length], keys_values[:span, self._kv_heads :, :length]
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=rows.decode_mask).flatten(1)
        return attended if rows.decode_slots is None else attended[rows.decode_slots]

    def _prefill(self, queries: Tensor, keys_values: Tensor, chunk: _ChunkRows) -> Tensor:
        """[rows, H, D] -> [rows, H * D]"""
        keys, values = keys_values[: self._kv_heads, : chunk.length], keys_values[self._kv_heads :, : chunk.length]
        attended = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1).flatten(1)

    def _feed_forward(self, index: int, hidden: Tensor) -> Tensor:
        layer = self._model.module.model.layers[index]
        hidden = self._normalize(hidden, layer.post_attention_layernorm.weight)
        gate, up = F.linear(hidden, self._model.layers[index].gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)

    def _normalize(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self._epsilon)

    @staticmethod
    def _rotate(heads: Tensor, rows: _Rows) -> None:
        """RoPE in place on [N, heads, D]; the sign of the first half is in the sines."""
        first, second = heads.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        heads.mul_(rows.cosines).addcmul_(swapped, rows.sines)

    def _rows(self, batch: Batch) -> _Rows:
        cache, device = self._cache, self._model.device
        decode_slots = np.array([sequence.slot for sequence in batch.decoding], np.int64)
        slots, positions = [decode_slots], [cache.lengths[decode_slots]]
        chunks, sampled = [], list(range(len(decode_slots)))
        begin = len(decode_slots)
        for chunk in batch.chunks:
            slot, end = chunk.sequence.slot, begin + chunk.count
            slots.append(np.full(chunk.count, slot))
            positions.append(np.arange(chunk.start, chunk.start + chunk.count))
            mask = _causal_mask(chunk.start, chunk.count, self._model)
            chunks.append(_ChunkRows(begin, end, slot, chunk.start + chunk.count, mask))
            if chunk.completes_prompt:
                sampled.append(end - 1)
            begin = end
        slots_N, positions_N = np.concatenate(slots), np.concatenate(positions)
        on_device = torch.from_numpy(positions_N).to(device)
        compact = np.array_equal(decode_slots, np.arange(len(decode_slots)))
        return _Rows(
            ids_N=torch.from_numpy(cache.ids[slots_N, positions_N]).to(device),
            positions_N=on_device,
            slots_N=torch.from_numpy(slots_N).to(device),
            cosines=self._cosines[on_device],
            sines=self._sines[on_device],
            decoding=len(decode_slots),
            decode_slots=None if compact else torch.from_numpy(decode_slots).to(device),
            decode_mask=_length_mask(decode_slots, positions[0], self._model),
            chunks=tuple(chunks),
            sampled_S=torch.tensor(sampled, dtype=torch.int64, device=device),
        )


def _rotary_table(model: LoadedModel, context_length: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each [context_length, 1, D], made by the model's own embedding so that every kind of
    RoPE scaling it knows is right."""
    positions = torch.arange(context_length, device=model.device)[None]
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    with torch.no_grad():
        cosines, sines = model.module.model.rotary_emb(like, positions)
    signed = torch.cat((-sines[..., : sines.shape[-1] // 2], sines[..., sines.shape[-1] // 2 :]), dim=-1)
    return cosines[0][:, None], signed[0][:, None]


def _length_mask(slots: NDArray[np.int64], positions: NDArray[np.int64], model: LoadedModel) -> Tensor:
    """[slots 0 .. highest, 1, 1, longest]: each slot sees its own length. A slot between that does not decode sees
    one position, since a row of nothing but minus infinity would be NaN."""
    last = np.zeros(slots.max(initial=-1) + 1, np.int64)
    last[slots] = positions
    hidden = np.arange(positions.max(initial=-1) + 1) > last[:, None]
    return _additive(hidden, model)[:, None, None]


def _causal_mask(start: int, count: int, model: LoadedModel) -> Tensor | None:
    """[count, start + count] for queries at start .. start + count; None when there is nothing before them."""
    if start == 0:
        return None
    return _additive(np.arange(start + count) > np.arange(start, start + count)[:, None], model)


def _additive(hidden: NDArray[np.bool_], model: LoadedModel) -> Tensor:
    mask = torch.zeros(hidden.shape, dtype=model.dtype)
    return mask.masked_fill_(torch.from_numpy(hidden), float("-inf")).to(model.device)
