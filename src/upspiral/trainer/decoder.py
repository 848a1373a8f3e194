"""A dense decoder's forward and backward pass over one forest batch, each layer in three steps with gradients by hand.

transformers' modules do the same in some forty operations a layer; for the small batches of a laptop their dispatch and
their copies cost as much as the products. Here a layer is projections, attention, and the rest; of each, what is cheap
is computed again in the backward pass instead of kept.

Shapes: T tokens, W hidden width, H query heads, K key heads, D head width, F inner width.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upspiral.kernel.rows import Rows, rows
from upspiral.trainer.attention import ForestPass, forest_attention
from upspiral.trainer.recompute import computed_again, recomputed_layers
from upspiral.weights.fused import FusedLayer, fuse_projections

Angles = tuple[Tensor, Tensor]
"""Cosines and sines, each [T, D]."""


def hidden_states(model: Any, token_ids_T: Tensor, positions_T: Tensor, forest: ForestPass) -> Tensor:
    """[T, W] after the last norm, with gradient: by compiled steps where the model and the machine allow it, else by
    the model's own modules."""
    decoder = None if forest.paths else _decoder_of(model)
    if decoder is not None:
        return decoder(token_ids_T, positions_T, forest)
    own = model.get_decoder()
    with recomputed_layers(own.layers if forest.recompute else ()):
        return own(
            input_ids=token_ids_T[None], position_ids=positions_T[None], use_cache=False, forest=forest
        ).last_hidden_state[0]


class CompiledDecoder:
    """The decoder of a Llama whose projections are plain."""

    def __init__(self, model: Any, compiled: Rows) -> None:
        decoder = model.model
        self._embedding, self._norm, self._rotary = decoder.embed_tokens.weight, decoder.norm, decoder.rotary_emb
        pairs = zip(decoder.layers, fuse_projections(model), strict=True)
        self._layers = [_Layer(module, fused, compiled) for module, fused in pairs]
        self._rows = compiled

    def __call__(self, token_ids_T: Tensor, positions_T: Tensor, forest: ForestPass) -> Tensor:
        for index, layer in enumerate(self._layers):
            layer.fused.check(f"layer {index}")
        hidden = F.embedding(token_ids_T, self._embedding)
        cosines, sines = self._rotary(hidden, positions_T[None])
        angles = cosines[0].contiguous(), sines[0].contiguous()
        for layer in self._layers:
            compute = computed_again(layer) if forest.recompute else layer
            hidden = compute(hidden, angles, forest)
        return _tensor(Norm.apply(hidden, self._norm.weight, self._norm.variance_epsilon, self._rows))


class _Layer:
    def __init__(self, module: Any, fused: FusedLayer, compiled: Rows) -> None:
        attention, feed_forward = module.self_attn, module.mlp
        self.fused, self.rows = fused, compiled
        assert fused.gate_up is not None
        self.gate_up = fused.gate_up
        self.width, self.scale = attention.head_dim, attention.scaling
        self.epsilon = module.input_layernorm.variance_epsilon
        self._attention = attention
        self._projections = module.input_layernorm.weight, *(part.weight for part in fused.qkv_parts)
        self._rest = (
            attention.o_proj.weight,
            module.post_attention_layernorm.weight,
            *(part.weight for part in fused.gate_up_parts),
            feed_forward.down_proj.weight,
        )
        self.key_heads = len(fused.qkv_parts[1].weight) // self.width
        self.query_heads = len(fused.qkv_parts[0].weight) // self.width

    def __call__(self, hidden: Tensor, angles: Angles, forest: ForestPass) -> Tensor:
        query, key, value = Projections.apply(hidden, *self._projections, self, angles)  # pyright: ignore[reportGeneralTypeIssues]
        attended, _ = forest_attention(self._attention, query, key, value, scaling=self.scale, forest=forest)
        return _tensor(FeedForward.apply(hidden, attended.reshape(len(hidden), -1), *self._rest, self))


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
    """apply(hidden [T,W], norm [W], query, key and value weights [..,W], layer, angles)
    -> (query [1,H,T,D], key [1,K,T,D], value [1,K,T,D]), the first two rotated."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        hidden, norm, *_, layer, angles = inputs
        normed, scales = layer.rows.norm(hidden[:, None], norm, layer.epsilon)
        heads = (normed[:, 0] @ layer.fused.qkv.mT).unflatten(1, (-1, layer.width))
        rotated = heads[:, : layer.query_heads + layer.key_heads]
        layer.rows.rotate(rotated, angles, rotated)
        ctx.save_for_backward(hidden, norm, scales)
        ctx.layer, ctx.angles = layer, angles
        query, key, value = heads.split([layer.query_heads, layer.key_heads, layer.key_heads], dim=1)
        return tuple(each.transpose(0, 1)[None] for each in (query, key, value))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, norm, scales = ctx.saved_tensors
        layer = ctx.layer
        query, key, value = (grad[0].transpose(0, 1) for grad in grads)
        heads, keys = layer.query_heads, layer.key_heads
        together = query.new_empty(len(query), heads + 2 * keys, layer.width)
        layer.rows.rotate(query, ctx.angles, together[:, :heads], back=True)
        layer.rows.rotate(key, ctx.angles, together[:, heads : heads + keys], back=True)
        together[:, heads + keys :] = value
        grad = together.flatten(1)
        normed, _ = layer.rows.norm(hidden[:, None], norm, layer.epsilon)
        grad_weights = (grad.mT @ normed[:, 0]).split([heads * layer.width, keys * layer.width, keys * layer.width])
        to, grad_norm = layer.rows.norm_gradients(hidden[:, None], norm, scales, (grad @ layer.fused.qkv)[:, None])
        return to[:, 0], grad_norm, *grad_weights, None, None


class FeedForward(torch.autograd.Function):
    """apply(hidden [T,W], attended [T,H*D], output weight [W,H*D], norm [W], gate and up [F,W], down [W,F], layer)
    -> [T,W]: adds the attention's output to hidden, then the gated feed-forward's."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, attended, output, norm, _, _, down, layer = inputs
        middle = hidden + attended @ output.mT
        normed, scales = layer.rows.norm(middle[:, None], norm, layer.epsilon)
        gates = normed[:, 0] @ layer.gate_up.mT
        ctx.save_for_backward(attended, middle, scales, gates, output, norm, down)
        ctx.layer = layer
        return middle + layer.rows.gate(gates) @ down.mT

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        attended, middle, scales, gates, output, norm, down = ctx.saved_tensors
        layer, grad = ctx.layer, grads[0].contiguous()
        grad_down = grad.mT @ layer.rows.gate(gates)
        grad_gates = layer.rows.gate_gradients(gates, grad @ down)
        normed, _ = layer.rows.norm(middle[:, None], norm, layer.epsilon)
        grad_gate, grad_up = (grad_gates.mT @ normed[:, 0]).chunk(2)
        grad_normed = (grad_gates @ layer.gate_up)[:, None]
        to, grad_norm = layer.rows.norm_gradients(middle[:, None], norm, scales, grad_normed, grad[:, None])
        grad_middle = to[:, 0]
        grad_output = grad_middle.mT @ attended
        return grad_middle, grad_middle @ output, grad_output, grad_norm, grad_gate, grad_up, grad_down, None


_decoders: WeakKeyDictionary[nn.Module, CompiledDecoder | None] = WeakKeyDictionary()


def _decoder_of(model: Any) -> CompiledDecoder | None:
    if not isinstance(model, nn.Module):
        return None
    if model not in _decoders:
        compiled = rows()
        _decoders[model] = CompiledDecoder(model, compiled) if compiled is not None and _fits(model) else None
    return _decoders[model]


def _fits(model: Any) -> bool:
    """Whether the compiled steps compute what the model's own modules do."""
    from transformers import LlamaForCausalLM

    if type(model) is not LlamaForCausalLM:
        return False
    parameters, config = list(model.parameters()), model.config
    known = all(x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu" for x in parameters)
    plain = all(type(x) is nn.Linear and x.bias is None for layer in model.model.layers for x in _projections(layer))
    widths = (config.head_dim or 1) % 32 == 0 and config.hidden_size % 16 == 0 and config.intermediate_size % 16 == 0
    return known and plain and widths and len({x.dtype for x in parameters}) == 1 and config.hidden_act == "silu"


def _projections(layer: Any) -> list[nn.Module]:
    return [
        module
        for block in (layer.self_attn, layer.mlp)
        for name, module in block.named_children()
        if name.endswith("_proj")
    ]


def _tensor(made: Any) -> Tensor:
    return made
