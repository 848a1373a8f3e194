"""The feed-forward half of a layer, on rows: dense, or a mixture of experts.

Shapes: N rows, C hidden width, K experts of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional as F

from upspiral.engine.embedded.projection import Projection
from upspiral.weights.experts import exact_experts, has_experts
from upspiral.weights.fused import FusedLayer


class FeedForward(Protocol):
    """Takes the normalised rows [N, C] and gives what is added to them."""

    def __call__(self, hidden_NC: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class DenseFeedForward:
    gate_up: Projection
    """[2 * intermediate, C]"""
    down: Projection

    def __call__(self, hidden_NC: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden_NC).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@dataclass(slots=True)
class ExpertFeedForward:
    """The trainer's own router and experts. `exact`: a row has the same bits whatever else is in the batch."""

    block: Any
    exact: bool
    chosen_NK: Tensor | None = None
    """Which experts the rows of the last call went to."""

    def __call__(self, hidden_NC: Tensor) -> Tensor:
        _, weights_NK, chosen_NK = self.block.gate(hidden_NC)
        self.chosen_NK = chosen_NK
        compute = partial(exact_experts, self.block.experts) if self.exact else self.block.experts
        return compute(hidden_NC, chosen_NK, weights_NK)


def fast_feed_forward(block: Any, fused: FusedLayer, projection: Callable[[Tensor], Projection]) -> FeedForward:
    if has_experts(block):
        return ExpertFeedForward(block, exact=False)
    assert fused.gate_up is not None
    return DenseFeedForward(projection(fused.gate_up), projection(block.down_proj.weight))


def exact_feed_forward(block: Any) -> Callable[[Tensor], Tensor]:
    return ExpertFeedForward(block, exact=True) if has_experts(block) else block
