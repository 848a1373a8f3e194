"""Replayed routes: in the trainer, a token goes to the experts that computed it in the engine (R3, arXiv 2510.11370).

Engine and trainer round differently, and where two experts are about equally likely one of them may choose the other:
then log-probabilities differ by far more than rounding. The choice is replayed; the weights of the chosen experts are
the router's own, of its logits now, so that gradients reach it.

Shapes: T tokens, L layers with experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from upspiral.types import UNKNOWN_EXPERT
from upspiral.weights.experts import expert_layers


@contextmanager
def replayed_routes_in(model: Any) -> Iterator[None]:
    """Within it, the layers with experts of a transformers model follow the routes of the ForestPass that is the
    keyword `forest` of its forward. Tokens without, and passes without, are routed by the model itself."""
    with ExitStack() as stack:
        for number, layer in enumerate(expert_layers(model)):
            replay = _Replay(number)
            # Attention comes before the experts of its layer, also where the layer is computed again for its gradient.
            for handle in (
                layer.self_attn.register_forward_pre_hook(replay.begin, with_kwargs=True),
                layer.mlp.gate.register_forward_hook(replay.route),
            ):
                stack.callback(handle.remove)
        yield


class _Replay:
    """What one layer is told."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._routes_TK: Tensor | None = None

    def begin(self, attention: Any, args: Any, keywords: dict[str, Any]) -> None:
        routes_TLK = getattr(keywords.get("forest"), "routes", None)
        self._routes_TK = None if routes_TLK is None else routes_TLK[:, self._number]

    def route(self, router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...] | None:
        """The router's logits, and its weights for the experts that are replayed."""
        routes_TK, self._routes_TK = self._routes_TK, None
        if routes_TK is None:
            return None
        logits_TE, weights_TK, chosen_TK = output
        routes_TK = routes_TK.to(chosen_TK)
        missing = len(chosen_TK) - len(routes_TK)  # rows that only fill up
        routes_TK = torch.cat([routes_TK, routes_TK.new_full((missing, routes_TK.shape[1]), UNKNOWN_EXPERT)])
        chosen_TK = torch.where(routes_TK == UNKNOWN_EXPERT, chosen_TK, routes_TK)
        wide = torch.float64 if logits_TE.dtype == torch.float64 else torch.float32
        replayed_TK = logits_TE.softmax(-1, dtype=wide).gather(1, chosen_TK)
        if router.norm_topk_prob:
            replayed_TK = replayed_TK / replayed_TK.sum(-1, keepdim=True)
        return logits_TE, replayed_TK.to(weights_TK.dtype), chosen_TK
