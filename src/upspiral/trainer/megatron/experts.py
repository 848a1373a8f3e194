"""Layers with experts, as forest batches on tensor-parallel ranks need them: who goes where, and what is summed.

Megatron's own dispatchers want the tokens of a batch divided over the tensor-parallel ranks. Ours are the same on all
of them, as forest attention needs them, and with those dispatchers every expert would see each token once a rank. Here
each rank computes its part of every expert's inner width, and the parts are summed, as in a dense layer.

Shapes: T tokens, E experts, K experts of a token, W hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, distributed
from torch.nn import functional as F

from upspiral.types import UNKNOWN_EXPERT


def use_own_experts(model: Any) -> None:
    """Lets the layers with experts of a Megatron model, whose routers are ForestRouters, take tokens this way, and
    follow the routes of the forest."""
    layers = [layer for layer in model.decoder.layers if hasattr(layer.mlp, "router")]
    for number, layer in enumerate(layers):
        layer.mlp.token_dispatcher = SameTokens(layer.mlp.tp_group)
        layer.mlp.router.number = number
        # Attention comes before the experts of its layer, also where the layer is computed again for its gradient.
        layer.self_attention.register_forward_pre_hook(layer.mlp.router.begin, with_kwargs=True)


class ForestRouter(TopKRouter):
    """Chooses and weighs experts as transformers does, and follows the routes of a forest where they are known (see
    `trainer/routes.py`).

    Megatron's RouterReplay replays the routes of all tokens or none, and its router's product needs Transformer Engine
    in version 0.16.1 (a name is missing without).
    """

    number = 0
    """Among the layers with experts."""
    _routes_TK: Tensor | None = None

    def begin(self, attention: Any, args: Any, keywords: dict[str, Any]) -> None:
        """Before the attention of the layer, which gets the ForestPass as its mask."""
        routes_TLK = keywords["attention_mask"].routes
        self._routes_TK = None if routes_TLK is None else routes_TLK[:, self.number]

    def gating(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weights of the chosen experts among zeros, and which are chosen, both [T,E]."""
        logits_TE = logits.flatten(0, -2)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        probs_TE = logits_TE.softmax(-1, dtype=wide)
        chosen_TK = probs_TE.topk(self.topk).indices
        routes_TK, self._routes_TK = self._routes_TK, None
        if routes_TK is not None:
            routes_TK = routes_TK.to(chosen_TK)
            chosen_TK = torch.where(routes_TK == UNKNOWN_EXPERT, chosen_TK, routes_TK)
        weights_TK = probs_TE.gather(1, chosen_TK)
        if not self.config.moe_router_pre_softmax:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, chosen_TK, weights_TK.to(logits.dtype))
        return weights_TE, torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_TK, True)


class SameTokens:
    """A dispatcher of Megatron's (`MoETokenDispatcher`) for ranks that all have the same tokens."""

    def __init__(self, group: Any) -> None:
        """`group`: the ranks that divide the inner width of the experts."""
        self._group = group
        self._shape = torch.Size()
        self._places = self._counts = torch.empty(0)

    def dispatch_preprocess(self, tokens: Tensor, routing_map_TE: Tensor, probs_TE: Tensor) -> tuple[Tensor, Tensor]:
        self._shape = tokens.shape
        tokens, probs_TE = (_SumOfGradients.apply(each, self._group) for each in (tokens, probs_TE))
        self._counts = routing_map_TE.sum(0)
        permuted, probs, self._places = permute(tokens.flatten(0, -2), routing_map_TE, probs=probs_TE)
        assert probs is not None
        return permuted, probs

    def token_dispatch(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return tokens, probs

    def dispatch_postprocess(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tokens, self._counts, probs

    def combine_preprocess(self, outputs: Tensor) -> Tensor:
        return unpermute(outputs, self._places, torch.Size([self._shape[:-1].numel(), self._shape[-1]]))

    def token_combine(self, outputs: Tensor) -> Tensor:
        return reduce_from_tensor_model_parallel_region(outputs, self._group)

    def combine_postprocess(self, outputs: Tensor) -> Tensor:
        return outputs.view(self._shape)


class _SumOfGradients(torch.autograd.Function):
    """apply(tensor, group) -> the tensor. On the way back, each rank of the group has the gradient of its part only.

    Megatron's `copy_to_tensor_model_parallel_region` loses the sum, without a word, of a gradient that is not
    contiguous, as that of the weights of experts.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        tensor, ctx.group = inputs
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=ctx.group)
        return total, None
