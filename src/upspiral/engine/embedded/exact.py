"""The forward pass that gives a token the bits that the trainer will give it (`engine.exact`).

Dense layers are those of `kernel/layer.py` and attention is that of `kernel/path_attention.py`, which the trainer uses
as well. Where they cannot be compiled or are not made for a model, its own modules and `weights/exact.py` stand in on
both sides. What else is in the batch then changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from upspiral.engine.embedded.decoder import DecoderForward, Rows, half_turned
from upspiral.engine.embedded.feed_forward import exact_feed_forward
from upspiral.engine.embedded.sequence import Batch
from upspiral.errors import ConfigError
from upspiral.weights.exact import at_least_some_rows
from upspiral.weights.experts import expert_layers
from upspiral.weights.load import LoadedModel

_VECTOR = 32
"""The most elements that torch's vectorised loops take at once."""


class ExactForward(DecoderForward):
    exact = True

    def _prepare(self) -> None:
        decoder: Any = self._model.module.model
        self._modules = [(layer, exact_feed_forward(layer.mlp)) for layer in decoder.layers]
        if self._dense is None:
            _check_width(self._model)

    def logits(self, batch: Batch) -> Tensor:
        """[S, V], in the dtype of the model, rows in the order of `batch.sampling`."""
        rows = self._rows(batch)
        hidden = at_least_some_rows(F.embedding(rows.ids_N, self._embedding))
        hidden = self._by_steps(self._dense, hidden, rows) if self._dense else self._by_modules(hidden, rows)
        sampled = at_least_some_rows(hidden[rows.sampled_S])
        return self._head(sampled)[: len(rows.sampled_S)]

    def _by_modules(self, hidden: Tensor, rows: Rows) -> Tensor:
        """All layers and the last norm by transformers' own modules, for what the compiled steps are not made for."""
        angles = self._angles[0][rows.positions_N, None], self._angles[1][rows.positions_N, None]
        for (layer, feed_forward), keys_values in zip(self._modules, self._cache.keys_values, strict=True):
            query, key_value = _heads_of(layer.self_attn, layer.input_layernorm(hidden)[: len(rows.ids_N)], angles)
            hidden = hidden + layer.self_attn.o_proj(self._attend(query, key_value, keys_values, rows))
            hidden = hidden + feed_forward(layer.post_attention_layernorm(hidden))
        self._keep_routes([feed_forward for _, feed_forward in self._modules], rows)
        return self._norm(hidden)


def _heads_of(attention: Any, normed: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Queries [N,H,D], and keys and values [N,2K,D]."""
    count, filled = len(normed), at_least_some_rows(normed)
    query, key, value = (
        getattr(attention, name)(filled)[:count].unflatten(-1, (-1, attention.head_dim))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = (each * angles[0] + half_turned(each) * angles[1] for each in (query, key))
    return query, torch.cat([key, value], dim=1)


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
