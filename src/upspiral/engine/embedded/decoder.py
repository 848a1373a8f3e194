"""The forward pass of a decoder over a packed batch, with keys and values in slots.

Shapes: N rows (one token each), S rows that are sampled, H query heads, K key-value heads, G = H / K, D head size,
V vocabulary. All rows share the multiplications; only attention treats decoding rows and prompt chunks apart. Weights
are the trainer's own; what a projection holds beside them is made again by `refresh`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from upspiral.engine.embedded.attention import attend_chunk, attend_slots
from upspiral.engine.embedded.cache import SlotCache
from upspiral.engine.embedded.feed_forward import ExpertFeedForward, FeedForward, fast_feed_forward
from upspiral.engine.embedded.projection import Projection
from upspiral.engine.embedded.sequence import Batch
from upspiral.engine.embedded.sharing import Sharing, find_sharing
from upspiral.weights.load import LoadedModel


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    """The trainer's own parameters, looked up once: walking the module costs a millisecond a step."""

    attention_norm: Tensor
    qkv: Projection
    head_norms: tuple[Tensor, Tensor] | None
    """Of each query and of each key, before they are rotated; None: they have none."""
    attention_out: Projection
    feed_forward_norm: Tensor
    feed_forward: FeedForward


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
class Rows:
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
    sharing: Sharing
    chunks: tuple[_ChunkRows, ...]
    sampled_S: Tensor


class DecoderForward:
    """Computes the logits of a batch and writes its keys and values into the cache."""

    def __init__(self, model: LoadedModel, cache: SlotCache):
        config = model.config
        self._model, self._cache = model, cache
        self._heads = config.num_attention_heads
        self._kv_heads = cache.keys_values.shape[2] // 2
        self._epsilon = config.rms_norm_eps
        self._layers = [_weights_of_layer(model, index) for index in range(len(model.layers))]
        self._head = Projection(model.module.lm_head.weight)
        self._cosines, self._sines = _rotary_table(model, cache.ids.shape[1])

    def refresh(self) -> None:
        """The weights have changed in place, or are new. Before the first batch and before the next one after it."""
        for layer in self._layers:
            for part in (layer.qkv, layer.attention_out, layer.feed_forward):
                part.refresh()
        self._head.refresh()

    def logits(self, batch: Batch) -> Tensor:
        """[S, V], in the dtype of the model, rows in the order of `batch.sampling`."""
        rows = self._rows(batch)
        decoder = self._model.module.model
        hidden = F.embedding(rows.ids_N, decoder.embed_tokens.weight)
        for layer, keys_values in zip(self._layers, self._cache.keys_values, strict=True):
            hidden = hidden + self._attend(layer, keys_values, hidden, rows)
            hidden = hidden + layer.feed_forward(self._normalize(hidden, layer.feed_forward_norm))
        self._keep_routes([layer.feed_forward for layer in self._layers], rows)
        hidden = self._normalize(hidden[rows.sampled_S], decoder.norm.weight)
        return self._head(hidden)

    def _keep_routes(self, blocks: Iterable[object], rows: Rows) -> None:
        if self._cache.routes is not None:
            chosen = [block.chosen_NK for block in blocks if isinstance(block, ExpertFeedForward)]
            routes_NLK = torch.stack([each for each in chosen if each is not None], dim=1)[: len(rows.ids_N)]
            self._cache.routes[rows.slots_N.cpu().numpy(), rows.positions_N.cpu().numpy()] = routes_NLK.cpu().numpy()

    def _attend(self, layer: _LayerWeights, keys_values: Tensor, hidden: Tensor, rows: Rows) -> Tensor:
        query_heads, key_heads = self._heads, self._kv_heads
        qkv = layer.qkv(self._normalize(hidden, layer.attention_norm))
        qkv = qkv.view(len(hidden), query_heads + 2 * key_heads, -1)
        if layer.head_norms is not None:
            queries, keys, _ = qkv.split((query_heads, key_heads, key_heads), dim=1)
            for heads, norm in zip((queries, keys), layer.head_norms, strict=True):
                heads.copy_(self._normalize(heads, norm))
        self._rotate(qkv[:, : query_heads + key_heads], rows)
        keys_values[rows.slots_N, :, rows.positions_N] = qkv[:, query_heads:]
        queries = qkv[:, :query_heads]
        parts = []
        if rows.decoding:
            parts.append(self._decode(queries[: rows.decoding], keys_values, rows))
        for chunk in rows.chunks:
            keys, values = keys_values[chunk.slot, :, : chunk.length].split(self._kv_heads)
            parts.append(attend_chunk(queries[chunk.begin : chunk.end], keys, values, chunk.mask))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return layer.attention_out(attended)

    def _decode(self, queries: Tensor, keys_values: Tensor, rows: Rows) -> Tensor:
        """[decoding, H, D] -> [decoding, H * D]"""
        span, length = rows.decode_mask.shape[0], rows.decode_mask.shape[-1]
        if rows.decode_slots is not None:
            queries = queries.new_zeros(span, *queries.shape[1:]).index_copy_(0, rows.decode_slots, queries)
        keys, values = keys_values[:span, :, :length].split(self._kv_heads, dim=1)
        attended = attend_slots(queries, keys, values, rows.decode_mask, rows.sharing)
        return attended if rows.decode_slots is None else attended[rows.decode_slots]

    def _normalize(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self._epsilon)

    @staticmethod
    def _rotate(heads: Tensor, rows: Rows) -> None:
        """RoPE in place on [N, heads, D]; the sign of the first half is in the sines."""
        first, second = heads.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        heads.mul_(rows.cosines).addcmul_(swapped, rows.sines)

    def _rows(self, batch: Batch) -> Rows:
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
        sharing = find_sharing(cache, decode_slots, device)
        compact = np.array_equal(decode_slots, np.arange(len(decode_slots)))
        return Rows(
            ids_N=torch.from_numpy(cache.ids[slots_N, positions_N]).to(device),
            positions_N=on_device,
            slots_N=torch.from_numpy(slots_N).to(device),
            cosines=self._cosines[on_device],
            sines=self._sines[on_device],
            decoding=len(decode_slots),
            decode_slots=None if compact else torch.from_numpy(decode_slots).to(device),
            decode_mask=_length_mask(decode_slots, positions[0], sharing.tails, self._model),
            sharing=sharing,
            chunks=tuple(chunks),
            sampled_S=torch.tensor(sampled, dtype=torch.int64, device=device),
        )


def _weights_of_layer(model: LoadedModel, index: int) -> _LayerWeights:
    layer: Any = model.module.model.layers[index]
    attention = layer.self_attn
    has_norms = hasattr(attention, "q_norm")
    return _LayerWeights(
        attention_norm=layer.input_layernorm.weight,
        qkv=Projection(model.layers[index].qkv),
        head_norms=(attention.q_norm.weight, attention.k_norm.weight) if has_norms else None,
        attention_out=Projection(attention.o_proj.weight),
        feed_forward_norm=layer.post_attention_layernorm.weight,
        feed_forward=fast_feed_forward(layer.mlp, model.layers[index]),
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


def _length_mask(
    slots: NDArray[np.int64], positions: NDArray[np.int64], tails: NDArray[np.int64], model: LoadedModel
) -> Tensor:
    """[slots 0 .. highest, 1, 1, longest]: each slot sees from where its tail begins to its own position. A slot
    between that does not decode sees position 0, since a row of nothing but minus infinity may be NaN."""
    last = np.zeros(len(tails), np.int64)
    last[slots] = positions
    every = np.arange(positions.max(initial=-1) + 1)
    return _additive((every > last[:, None]) | (every < tails[:, None]), model)[:, None, None]


def _causal_mask(start: int, count: int, model: LoadedModel) -> Tensor | None:
    """[count, start + count] for queries at start .. start + count; None when there is nothing before them."""
    if start == 0:
        return None
    return _additive(np.arange(start + count) > np.arange(start, start + count)[:, None], model)


def _additive(hidden: NDArray[np.bool_], model: LoadedModel) -> Tensor:
    mask = torch.zeros(hidden.shape, dtype=model.dtype)
    return mask.masked_fill_(torch.from_numpy(hidden), float("-inf")).to(model.device)
