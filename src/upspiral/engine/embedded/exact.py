"""The forward pass that gives a token the bits that the trainer will give it (`engine.exact`).

Dense layers are those of `kernel/layer.py` and attention is that of `kernel/path_attention.py`, which the trainer uses
as well. Where they cannot be compiled or are not made for a model, its own modules and `weights/exact.py` stand in on
both sides. What else is in the batch then changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from upspiral.engine.embedded.cache import SlotCache
from upspiral.engine.embedded.decoder import DecoderForward, Rows
from upspiral.engine.embedded.feed_forward import exact_feed_forward
from upspiral.engine.embedded.sequence import Batch
from upspiral.errors import ConfigError
from upspiral.kernel.layer import DenseLayer, dense_layers
from upspiral.kernel.path_attention import PathAttention, Plan, Segment, path_attention
from upspiral.weights.exact import at_least_some_rows, exact_attention, exact_chunk
from upspiral.weights.experts import expert_layers
from upspiral.weights.load import LoadedModel

_VECTOR = 32
"""The most elements that torch's vectorised loops take at once."""


class ExactForward(DecoderForward):
    def __init__(self, model: LoadedModel, cache: SlotCache) -> None:
        super().__init__(model, cache)
        self._scale = cache.keys_values.shape[-1] ** -0.5
        decoder: Any = model.module.model
        self._dense = dense_layers(model.module, model.layers)
        if self._dense is None:
            _check_width(model)
        self._modules = [(layer, exact_feed_forward(layer.mlp)) for layer in decoder.layers]
        group = self._heads // self._kv_heads
        one_of_each = (cache.keys_values[0, 0, :1].expand(group, -1, -1), cache.keys_values[0, 0, :1])
        self._compiled = path_attention() if PathAttention.takes(*one_of_each) else None

    def refresh(self) -> None:
        """Nothing is held beside the trainer's weights."""

    def logits(self, batch: Batch) -> Tensor:
        """[S, V], in the dtype of the model, rows in the order of `batch.sampling`."""
        rows = self._rows(batch)
        decoder: Any = self._model.module.model
        hidden = at_least_some_rows(F.embedding(rows.ids_N, decoder.embed_tokens.weight))
        hidden = self._by_modules(hidden, rows) if self._dense is None else self._by_steps(self._dense, hidden, rows)
        sampled = at_least_some_rows(hidden[rows.sampled_S])
        return F.linear(sampled, self._model.module.lm_head.weight)[: len(rows.sampled_S)]

    def _by_steps(self, layers: list[DenseLayer], hidden: Tensor, rows: Rows) -> Tensor:
        """All layers and the last norm, as the trainer's compiled decoder computes them."""
        count = len(rows.ids_N)
        half = rows.sines.shape[-1] // 2  # in the sines, the sign of the first half is that of RoPE
        sines = rows.sines[:, 0, half:].repeat(1, 2)
        angles = at_least_some_rows(rows.cosines[:, 0]), at_least_some_rows(sines)
        for layer, keys_values in zip(layers, self._cache.keys_values, strict=True):
            made = layer.project(hidden, angles)
            heads = (each[:count] for each in (made.query_THD, made.key_TKD, made.value_TKD))
            hidden = layer.finish(hidden, self._mix(heads, keys_values, rows, len(hidden))).hidden
        norm: Any = self._model.module.model.norm
        return layers[0].rows.norm(hidden[:, None], norm.weight, norm.variance_epsilon)[0][:, 0]

    def _by_modules(self, hidden: Tensor, rows: Rows) -> Tensor:
        """The same by transformers' own modules, for what the compiled steps are not made for."""
        for (layer, feed_forward), keys_values in zip(self._modules, self._cache.keys_values, strict=True):
            heads = self._heads_of(layer.self_attn, layer.input_layernorm(hidden), rows)
            attended = self._mix(heads, keys_values, rows, len(hidden))
            hidden = hidden + layer.self_attn.o_proj(attended)
            hidden = hidden + feed_forward(layer.post_attention_layernorm(hidden))
        self._keep_routes([feed_forward for _, feed_forward in self._modules], rows)
        norm: Any = self._model.module.model.norm
        return norm(hidden)

    def _heads_of(self, attention: Any, hidden: Tensor, rows: Rows) -> Iterator[Tensor]:
        """Queries [N,H,D], keys and values [N,K,D]."""
        query, key, value = (
            getattr(attention, name)(hidden)[: len(rows.ids_N)].unflatten(-1, (-1, self._cache.keys_values.shape[-1]))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        yield from (each * rows.cosines + _swapped(each) * rows.sines for each in (query, key))
        yield value

    def _mix(self, heads: Iterable[Tensor], keys_values: Tensor, rows: Rows, filled: int) -> Tensor:
        """Writes keys and values into the cache and attends; `filled` rows [.., H * D], of which the last may be 0."""
        query, key, value = heads
        keys_values[rows.slots_N, :, rows.positions_N] = torch.cat([key, value], dim=1)
        decode, attend = self._decode_exactly, self._chunk_exactly
        if self._compiled is not None:
            decode, attend = self._decode_compiled, self._chunk_compiled
        parts = [decode(query[: rows.decoding], keys_values, rows)] if rows.decoding else []
        for chunk in rows.chunks:
            keys, values = keys_values[chunk.slot, :, : chunk.length].split(self._kv_heads)
            parts.append(attend(query[chunk.begin : chunk.end], keys, values))
        attended = torch.cat(parts).to(query.dtype)
        return F.pad(attended, (0, 0, 0, filled - len(attended)))

    def _decode_compiled(self, query: Tensor, keys_values: Tensor, rows: Rows) -> Tensor:
        """[decoding, H, D] -> [decoding, H * D]"""
        assert self._compiled is not None
        slots, lengths = rows.slots_N[: rows.decoding], rows.positions_N[: rows.decoding] + 1
        keys, values = keys_values.split(self._kv_heads, dim=1)
        return self._compiled.decode(query, (keys, values), slots, lengths, self._scale).flatten(1)

    def _chunk_compiled(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[rows, H, D], keys and values [K, L, D] -> [rows, H * D]"""
        assert self._compiled is not None
        plan = Plan.of([Segment(0, len(query), [(0, keys.shape[1])])], self._heads // self._kv_heads)
        output, _ = self._compiled.forward(query.transpose(0, 1), keys, values, plan, self._scale)
        return output.transpose(0, 1).flatten(1)

    def _chunk_exactly(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The same by torch."""
        queries = query.unflatten(1, (self._kv_heads, -1)).permute(1, 2, 0, 3)
        output, _ = exact_chunk(queries, keys, values, self._scale)
        return output.permute(2, 0, 1, 3).flatten(1)

    def _decode_exactly(self, query: Tensor, keys_values: Tensor, rows: Rows) -> Tensor:
        """The same by torch."""
        slots, positions = rows.slots_N[: rows.decoding], rows.positions_N[: rows.decoding]
        # Slots 0, 1, 2 ... need not be gathered.
        held = keys_values[: rows.decoding] if rows.decode_slots is None else keys_values[slots]
        keys, values = held[:, :, : int(positions.max()) + 1].split(self._kv_heads, dim=1)
        grouped = query.unflatten(1, (self._kv_heads, -1))
        seen = (positions + 1)[:, None, None].expand(*grouped.shape[:3])
        output, _ = exact_attention(grouped, keys, values, seen, self._scale)
        return output.flatten(1)


def _check_width(model: LoadedModel) -> None:
    """torch computes the activation of the elements that its vectors leave over otherwise, by a bit or two of float32.
    Which those are depends on the number of rows, unless a row is a whole number of vectors. Rows of experts stand
    apart."""
    width = model.config.intermediate_size
    is_dense = len(expert_layers(model.module)) < len(model.layers)
    if model.dtype == torch.float32 and is_dense and width % _VECTOR:
        raise ConfigError(
            f"engine.exact = true, but intermediate_size = {width} of the model is no multiple of {_VECTOR}, so "
            'float32 would not be exact; set model.dtype = "bfloat16" or engine.exact = false'
        )


def _swapped(heads: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)
