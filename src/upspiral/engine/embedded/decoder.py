"""The forward pass of a decoder over a packed batch, with keys and values in slots.

Shapes: N rows (one token each), S rows that are sampled, H query heads, K key-value heads, G = H / K, D head size,
V vocabulary. All rows share the multiplications; only attention treats decoding rows and prompt chunks apart. Weights
are the trainer's own; what a projection holds beside them is made again by `refresh`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from upspiral.engine.embedded.attention import slot_attention
from upspiral.engine.embedded.cache import SlotCache
from upspiral.engine.embedded.feed_forward import ExpertFeedForward, FeedForward, fast_feed_forward
from upspiral.engine.embedded.projection import Projection
from upspiral.engine.embedded.sequence import Batch
from upspiral.kernel.layer import DenseLayer, dense_layers
from upspiral.weights.exact import at_least_some_rows
from upspiral.weights.fused import FusedLayer
from upspiral.weights.load import LoadedModel


@dataclass(frozen=True, slots=True)
class _ChunkRows:
    """Rows begin .. end of the batch are positions .. `length` of one slot's prompt."""

    begin: int
    end: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch as tensors. The first `decoding` rows decode."""

    ids_N: Tensor
    positions_N: Tensor
    slots_N: Tensor
    decoding: int
    chunks: tuple[_ChunkRows, ...]
    sampled_S: Tensor


class DecoderForward:
    """Computes the logits of a batch and writes its keys and values into the cache.

    Dense layers are those of `kernel/layer.py` where that can be compiled; other layers, and other devices, compute in
    torch. `exact`: rows are multiplied as the trainer does it, so that a token gets the trainer's bits; else by what
    is fastest."""

    exact = False

    def __init__(self, model: LoadedModel, cache: SlotCache):
        config, decoder = model.config, cast(Any, model.module.model)
        self._model, self._cache = model, cache
        self._heads = config.num_attention_heads
        self._kv_heads = cache.keys_values.shape[2] // 2
        self._norm, self._embedding = decoder.norm, decoder.embed_tokens.weight
        self._angles = _rotary_table(model, cache.ids.shape[1])
        one_head = cache.keys_values[0, 0, :1]
        self._attention = slot_attention(
            one_head.expand(self._heads // self._kv_heads, -1, -1), one_head, exact=self.exact
        )
        self._projections: list[Projection] = []
        """What holds something beside the trainer's weights."""
        self._head = self._projection(model.module.lm_head.weight)
        self._dense = dense_layers(model.module, model.layers, self._projection)
        self._prepare()

    def _prepare(self) -> None:
        """Looks up once what stands in for the compiled steps: walking the module costs a millisecond a step."""
        self._layers: list[TorchLayer] = []
        if self._dense is None:
            pairs = zip(cast(Any, self._model.module.model.layers), self._model.layers, strict=True)
            self._layers = [TorchLayer.of(layer, fused, self._projection) for layer, fused in pairs]

    def _projection(self, weight: Tensor) -> Projection:
        self._projections.append(Projection(weight, exact=self.exact))
        return self._projections[-1]

    def refresh(self) -> None:
        """The weights have changed in place, or are new. Before the first batch and before the next one after it."""
        for projection in self._projections:
            projection.refresh()

    def release(self) -> None:
        """Gives back what is held beside the weights; `refresh` before the next batch."""
        for projection in self._projections:
            projection.release()

    def logits(self, batch: Batch) -> Tensor:
        """[S, V], in the dtype of the model, rows in the order of `batch.sampling`."""
        rows = self._rows(batch)
        hidden = F.embedding(rows.ids_N, self._embedding)
        hidden = self._by_steps(self._dense, hidden, rows) if self._dense else self._by_torch(hidden, rows)
        return self._head(hidden[rows.sampled_S])

    def _by_steps(self, layers: list[DenseLayer], hidden: Tensor, rows: Rows) -> Tensor:
        """All layers and the last norm in compiled steps. Rows of `hidden` beyond those of the batch only fill up."""
        count = len(rows.ids_N)
        positions = F.pad(rows.positions_N, (0, len(hidden) - count))
        angles = self._angles[0][positions], self._angles[1][positions]
        for layer, keys_values in zip(layers, self._cache.keys_values, strict=True):
            made = layer.project(hidden, angles)
            query, key, value = (each[:count] for each in (made.query_THD, made.key_TKD, made.value_TKD))
            hidden = layer.finish(hidden, self._attend(query, torch.cat([key, value], 1), keys_values, rows)).hidden
        return layers[0].rows.norm(hidden[:, None], self._norm.weight, self._norm.variance_epsilon)[0][:, 0]

    def _by_torch(self, hidden: Tensor, rows: Rows) -> Tensor:
        angles = self._angles[0][rows.positions_N, None], self._angles[1][rows.positions_N, None]
        epsilon = self._norm.variance_epsilon
        for layer, keys_values in zip(self._layers, self._cache.keys_values, strict=True):
            query, key_value = layer.heads(hidden, angles, epsilon)
            hidden = hidden + layer.output(self._attend(query, key_value, keys_values, rows))
            hidden = hidden + layer.feed_forward(rms_norm(hidden, layer.feed_forward_norm, epsilon))
        self._keep_routes([layer.feed_forward for layer in self._layers], rows)
        return rms_norm(hidden, self._norm.weight, epsilon)

    def _keep_routes(self, blocks: Iterable[object], rows: Rows) -> None:
        if self._cache.routes is not None:
            chosen = [block.chosen_NK for block in blocks if isinstance(block, ExpertFeedForward)]
            routes_NLK = torch.stack([each for each in chosen if each is not None], dim=1)[: len(rows.ids_N)]
            self._cache.routes[rows.slots_N.cpu().numpy(), rows.positions_N.cpu().numpy()] = routes_NLK.cpu().numpy()

    def _attend(self, query: Tensor, key_value: Tensor, keys_values: Tensor, rows: Rows) -> Tensor:
        """Writes keys and values [N, 2K, D] into the cache and attends. query [N, H, D] -> [N, H * D], with zeros
        behind them up to LEAST_ROWS where the forward is exact."""
        keys_values[rows.slots_N, :, rows.positions_N] = key_value
        count, parts = rows.decoding, []
        if count:
            both = keys_values.split(self._kv_heads, dim=1)
            lengths = rows.positions_N[:count] + 1
            parts.append(self._attention.decode(query[:count], (both[0], both[1]), rows.slots_N[:count], lengths))
        for chunk in rows.chunks:
            keys, values = keys_values[chunk.slot, :, : chunk.length].split(self._kv_heads)
            parts.append(self._attention.chunk(query[chunk.begin : chunk.end], keys, values))
        attended = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
        return at_least_some_rows(attended) if self.exact else attended

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
            chunks.append(_ChunkRows(begin, end, slot, chunk.start + chunk.count))
            if chunk.completes_prompt:
                sampled.append(end - 1)
            begin = end
        slots_N, positions_N = np.concatenate(slots), np.concatenate(positions)
        return Rows(
            ids_N=torch.from_numpy(cache.ids[slots_N, positions_N]).to(device),
            positions_N=torch.from_numpy(positions_N).to(device),
            slots_N=torch.from_numpy(slots_N).to(device),
            decoding=len(decode_slots),
            chunks=tuple(chunks),
            sampled_S=torch.tensor(sampled, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True, slots=True)
class TorchLayer:
    """A layer in torch, of the trainer's own parameters."""

    attention_norm: Tensor
    qkv: Projection
    head_norms: tuple[Tensor, ...]
    """Of queries and of keys, before they are rotated; none: they have none."""
    output: Projection
    feed_forward_norm: Tensor
    feed_forward: FeedForward
    sizes: tuple[int, int]
    """Query heads, and heads of keys and values together."""

    @classmethod
    def of(cls, layer: Any, fused: FusedLayer, projection: Callable[[Tensor], Projection]) -> TorchLayer:
        attention = layer.self_attn
        norms = (getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name))
        query, key, _ = (len(part.weight) // attention.head_dim for part in fused.qkv_parts)
        return cls(
            attention_norm=layer.input_layernorm.weight,
            qkv=projection(fused.qkv),
            head_norms=tuple(norm.weight for norm in norms),
            output=projection(attention.o_proj.weight),
            feed_forward_norm=layer.post_attention_layernorm.weight,
            feed_forward=fast_feed_forward(layer.mlp, fused, projection),
            sizes=(query, 2 * key),
        )

    def heads(self, hidden: Tensor, angles: tuple[Tensor, Tensor], epsilon: float) -> tuple[Tensor, Tensor]:
        """Queries [N, H, D], and keys and values [N, 2K, D], rotated by `angles`, each [N, 1, D]."""
        qkv = self.qkv(rms_norm(hidden, self.attention_norm, epsilon)).unflatten(1, (sum(self.sizes), -1))
        rotated = [qkv[:, : self.sizes[0]], qkv[:, self.sizes[0] : self.sizes[0] + self.sizes[1] // 2]]
        for heads, norm in zip(rotated, self.head_norms, strict=False):
            heads.copy_(rms_norm(heads, norm, epsilon))
        for heads in rotated:
            heads.copy_(heads * angles[0] + half_turned(heads) * angles[1])
        query, key_value = qkv.split(self.sizes, dim=1)
        return query, key_value


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, epsilon)


def half_turned(heads: Tensor) -> Tensor:
    """The halves of each head exchanged, with the sign that RoPE gives the first."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotary_table(model: LoadedModel, context_length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [context_length, D], made by the model's own embedding so that every kind of RoPE scaling
    it knows is right."""
    positions = torch.arange(context_length, device=model.device)[None]
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    with torch.no_grad():
        cosines, sines = model.module.model.rotary_emb(like, positions)
    return cosines[0], sines[0]
