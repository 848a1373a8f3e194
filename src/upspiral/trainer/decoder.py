"""A dense decoder's forward and backward pass over one forest batch, each layer in three steps with gradients by hand.

transformers' modules do the same in some forty operations a layer; for the small batches of a laptop their dispatch and
their copies cost as much as the products. Here a layer is projections, attention, and the rest; of each, what is cheap
is computed again in the backward pass instead of kept. Products that would make the gradient of a weight that is not
trained, as beside adapters, are left out.

Shapes: T tokens, W hidden width, H query heads, K key heads, D head width, F inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upspiral.kernel.layer import Angles, DenseLayer, dense_layers
from upspiral.kernel.product import multiply
from upspiral.trainer.attention import ForestPass, forest_attention
from upspiral.trainer.recompute import computed_again, recomputed_layers
from upspiral.weights.families import CausalModule
from upspiral.weights.fused import fuse_projections


def hidden_states(model: Any, token_ids_T: Tensor, positions_T: Tensor, forest: ForestPass) -> Tensor:
    """[T, W] after the last norm, with gradient: by compiled steps where the model and the machine allow it, else by
    the model's own modules."""
    decoder = _decoder_of(model)
    if decoder is not None:
        return decoder(token_ids_T, positions_T, forest)
    own = model.get_decoder()
    with recomputed_layers(own.layers if forest.recompute else ()):
        return own(
            input_ids=token_ids_T[None], position_ids=positions_T[None], use_cache=False, forest=forest
        ).last_hidden_state[0]


def prepare(model: Any) -> None:
    """Lays the model's projections side by side, which replaces the data of its parameters: before anything else that
    shares them is made."""
    if isinstance(model, CausalModule):
        fuse_projections(model)


def compute_by_modules(model: Any) -> None:
    """From now on the model computes by its own modules, as it must where its weights lie on many ranks."""
    _decoders[model] = None


class CompiledDecoder:
    """The decoder of a model whose layers are dense and whose projections are plain."""

    def __init__(self, model: Any, layers: list[DenseLayer]) -> None:
        decoder = model.model
        self._embedding, self._norm, self._rotary = decoder.embed_tokens.weight, decoder.norm, decoder.rotary_emb
        self._layers = layers

    @classmethod
    def of(cls, model: Any) -> CompiledDecoder | None:
        """None for a model, or on a machine, that the compiled steps are not made for."""
        layers = dense_layers(model, fuse_projections(model)) if isinstance(model, CausalModule) else None
        return None if layers is None else cls(model, layers)

    def __call__(self, token_ids_T: Tensor, positions_T: Tensor, forest: ForestPass) -> Tensor:
        for index, layer in enumerate(self._layers):
            layer.fused.check(f"layer {index}")
        hidden = F.embedding(token_ids_T, self._embedding)
        cosines, sines = self._rotary(hidden, positions_T[None])
        angles = cosines[0].contiguous(), sines[0].contiguous()
        compute = computed_again(_layer) if forest.recompute else _layer
        for layer in self._layers:
            hidden = compute(layer, hidden, angles, forest)
        return _tensor(Norm.apply(hidden, self._norm.weight, self._norm.variance_epsilon, self._layers[0].rows))


def _layer(layer: DenseLayer, hidden: Tensor, angles: Angles, forest: ForestPass) -> Tensor:
    fused = layer.fused
    projections = (part.weight for part in fused.qkv_parts)
    query, key, value = Projections.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, layer.attention_norm, *projections, *(layer.head_norms or (None, None)), layer, angles
    )
    attended, _ = forest_attention(layer.attention, query, key, value, scaling=layer.scale, forest=forest)
    rest = layer.output, layer.feed_forward_norm, *(part.weight for part in fused.gate_up_parts), layer.down
    return _tensor(FeedForward.apply(hidden, attended.reshape(len(hidden), -1), *rest, layer))


class Norm(torch.autograd.Function):
    """apply(hidden [T,W], weight [W], epsilon, rows) -> [T,W]"""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, weight, epsilon, compiled = inputs
        normed, scales = compiled.norm(hidden[:, None], weight, epsilon)
        ctx.save_for_backward(hidden, weight, scales)
        ctx.rows = compiled
        return normed[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, scales = ctx.saved_tensors
        to, grad_weight = ctx.rows.norm_gradients(hidden[:, None], weight, scales, grads[0].contiguous()[:, None])
        return to[:, 0], grad_weight, None, None


class Projections(torch.autograd.Function):
    """apply(hidden [T,W], norm [W], query, key and value weights [..,W], norms of queries and keys [D] or None, layer,
    angles) -> (query [1,H,T,D], key [1,K,T,D], value [1,K,T,D]), the first two rotated."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        hidden, *_, layer, angles = inputs
        made = layer.project(hidden, angles)
        ctx.save_for_backward(hidden, made.scales, made.heads, *made.head_scales)
        ctx.layer, ctx.angles = layer, angles
        return tuple(each.transpose(0, 1)[None] for each in (made.query_THD, made.key_TKD, made.value_TKD))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, scales, before, *head_scales = ctx.saved_tensors
        layer: DenseLayer = ctx.layer
        sizes = [layer.query_heads, layer.key_heads, layer.key_heads]
        together = grads[0].new_empty(len(hidden), sum(sizes), layer.width)
        parts = together.split(sizes, dim=1)
        for grad, part in zip(grads[:2], parts, strict=False):
            layer.rows.rotate(grad[0].transpose(0, 1), ctx.angles, part, back=True)
        parts[2].copy_(grads[2][0].transpose(0, 1))
        grad_head_norms: list[Tensor | None] = [None, None]
        for index, head_scale in enumerate(head_scales):
            own = before.split(sizes, dim=1)[index]
            made, grad_head_norms[index] = layer.rows.norm_gradients(
                own, layer.head_norms[index], head_scale, parts[index]
            )
            parts[index].copy_(made)
        grad = together.flatten(1)
        rows_T1W = hidden[:, None]
        grad_weights: Sequence[Tensor | None] = [None] * 3
        if any(ctx.needs_input_grad[2:5]):
            normed, _ = layer.rows.norm(rows_T1W, layer.attention_norm, layer.epsilon)
            grad_weights = multiply(grad.mT, normed[:, 0].mT).split([size * layer.width for size in sizes])
        grad_normed = multiply(grad, layer.qkv.mT)[:, None]
        to, grad_norm = layer.rows.norm_gradients(rows_T1W, layer.attention_norm, scales, grad_normed)
        return to[:, 0], grad_norm, *grad_weights, *grad_head_norms, None, None


class FeedForward(torch.autograd.Function):
    """apply(hidden [T,W], attended [T,H*D], output weight [W,H*D], norm [W], gate and up [F,W], down [W,F], layer)
    -> [T,W]: adds the attention's output to hidden, then the gated feed-forward's."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, attended, *_, layer = inputs
        made = layer.finish(hidden, attended)
        ctx.save_for_backward(attended, made.middle, made.scales, made.gates)
        ctx.layer = layer
        return made.hidden

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        attended, middle, scales, gates = ctx.saved_tensors
        layer: DenseLayer = ctx.layer
        needs_output, _, needs_gate, needs_up, needs_down = ctx.needs_input_grad[2:7]
        grad, middle_T1W = grads[0].contiguous(), middle[:, None]
        grad_down = multiply(grad.mT, layer.rows.gate(gates).mT) if needs_down else None
        grad_gates = layer.rows.gate_gradients(gates, multiply(grad, layer.down.mT))
        grad_gate = grad_up = None
        if needs_gate or needs_up:
            normed, _ = layer.rows.norm(middle_T1W, layer.feed_forward_norm, layer.epsilon)
            grad_gate, grad_up = multiply(grad_gates.mT, normed[:, 0].mT).chunk(2)
        grad_normed = multiply(grad_gates, layer.gate_up.mT)[:, None]
        to, grad_norm = layer.rows.norm_gradients(
            middle_T1W, layer.feed_forward_norm, scales, grad_normed, grad[:, None]
        )
        grad_middle = to[:, 0]
        grad_output = multiply(grad_middle.mT, attended.mT) if needs_output else None
        grad_attended = multiply(grad_middle, layer.output.mT)
        return grad_middle, grad_attended, grad_output, grad_norm, grad_gate, grad_up, grad_down, None


_decoders: WeakKeyDictionary[nn.Module, CompiledDecoder | None] = WeakKeyDictionary()


def _decoder_of(model: Any) -> CompiledDecoder | None:
    if not isinstance(model, nn.Module):
        return None
    if model not in _decoders:
        _decoders[model] = CompiledDecoder.of(model)
    return _decoders[model]


def _tensor(made: Any) -> Tensor:
    return made
