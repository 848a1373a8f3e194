"""Forest attention: each token attends to its own path, without a mask of tokens by tokens.

This file chooses who computes it: FlexAttention on a GPU (`flex.py`), our kernel where it can be compiled
(`segments.py`), and torch's own operations elsewhere (`spans.py`).

Registered with transformers as "upspiral_forest"; a `ForestPass` travels to it as the keyword `forest` of the forward
pass. Keys and values of a batch's context stand before its own.
Shapes: B = 1, H query heads, K key heads (H a multiple of K), T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from upspiral.kernel.path_attention import PathAttention, Plan, path_attention
from upspiral.trainer.flex import attend_by_blocks, block_mask_of, flex_attention_takes
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.segments import SegmentAttention, segments_of
from upspiral.trainer.spans import Path, Span, SpanAttention, kernel_for, paths_of, spans_of

ATTENTION_NAME = "upspiral_forest"

End = tuple[Tensor, Tensor | None]
"""A tensor that a backward pass begins at, and the gradient that is there already; None: 1, for a loss."""


@dataclass(frozen=True, slots=True, eq=False)
class KeptLayer:
    """Keys and values [1,K,T,D] of one layer, for batches that have this one as context."""

    computed: tuple[Tensor, Tensor]
    """With the graph that leads to them."""
    leaves: tuple[Tensor, Tensor]
    """The same numbers, cut off: what hangs below leaves its gradients here."""


class ForestPass:
    """One batch on its way through a model: which keys each query sees, and what batches below it will need.

    A pass serves one forward. A layer that is computed again in the backward pass finds what it found before.
    """

    def __init__(
        self,
        batch: ForestBatch,
        earlier: Sequence[ForestPass | None] = (),
        *,
        keeps: bool = False,
        exact: bool = False,
        recompute: bool = False,
    ) -> None:
        """`earlier`: the passes of the lane's batches before this one, as far as they are kept. `keeps`: others hang
        below it. `exact`: to the same bits as the engine in its exact mode. `recompute`: layers are computed again in
        the backward pass."""
        self.recompute = recompute
        self._batch = batch
        self._plans: dict[int, Plan] = {}
        self._block_mask: BlockMask | None = None
        self.exact = exact
        self.routes = torch.from_numpy(batch.routes_TLK) if batch.routes_TLK.size else None
        self.kept: dict[int, KeptLayer] = {}
        self._runs = [(earlier[run.batch], run) for run in batch.context]
        self._keeps = keeps

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        return spans_of(self._batch)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        return paths_of(self._batch)

    def plan(self, group: int) -> Plan:
        """For the compiled kernel, where `group` query heads share a key head."""
        if group not in self._plans:
            self._plans[group] = Plan.of(segments_of(self._batch), group)
        return self._plans[group]

    def block_mask(self, device: torch.device) -> BlockMask:
        """For FlexAttention; one for all layers."""
        if self._block_mask is None:
            self._block_mask = block_mask_of(self._batch, device)
        return self._block_mask

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the context's keys and values of a layer before those of the batch."""
        if self._keeps:
            key_leaf, value_leaf = (tensor.detach().requires_grad_(tensor.requires_grad) for tensor in (key, value))
            self.kept[layer] = KeptLayer((key, value), (key_leaf, value_leaf))
        if not self._runs:
            return key, value
        pairs = [(self._leaves(each, layer), run) for each, run in self._runs]
        keys = [leaves[0][:, :, run.start : run.end] for leaves, run in pairs]
        values = [leaves[1][:, :, run.start : run.end] for leaves, run in pairs]
        return torch.cat([*keys, key], dim=2), torch.cat([*values, value], dim=2)

    def backward(self, loss: Tensor | None) -> None:
        """The backward pass of the batch, after those of all batches that have it as context."""
        ends = self.ends(loss)
        if ends:
            torch.autograd.backward([end for end, _ in ends], [grad for _, grad in ends])

    def ends(self, loss: Tensor | None) -> list[End]:
        """Where that pass begins, for those who run it themselves; afterwards the pass keeps nothing."""
        ends: list[End] = [(loss, None)] if loss is not None and loss.requires_grad else []
        self._keeps = False  # what is computed again from here on has nothing below it any more
        for layer in self.kept.values():
            pairs = zip(layer.computed, layer.leaves, strict=True)
            ends += [(computed, leaf.grad) for computed, leaf in pairs if leaf.grad is not None]
        self.kept.clear()
        return ends

    @staticmethod
    def _leaves(earlier: ForestPass | None, layer: int) -> tuple[Tensor, Tensor]:
        assert earlier is not None, "a batch needs the passes of its context"
        return earlier.kept[layer].leaves


def forest_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface. Takes query [1,H,T,D], key and value [1,K,T,D] after RoPE
    and the keywords `scaling` and `forest` (a ForestPass); returns ([1,T,H,D], None). `module` says by `layer_idx`
    which layer of the model it is."""
    forest: ForestPass | None = kwargs.get("forest")
    if forest is None:
        raise ValueError(
            f"attention {ATTENTION_NAME!r} needs the keyword forest=ForestPass(batch) in the model's forward"
        )
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    key, value = forest.extend(module.layer_idx, key, value)
    return _attend(forest, query, key, value, scale).transpose(1, 2), None


def _attend(forest: ForestPass, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Any:
    compiled = path_attention() if PathAttention.takes(query, key) else None
    if compiled is not None:
        plan = forest.plan(query.shape[1] // key.shape[1])
        return SegmentAttention.apply(query, key, value, plan, scale, compiled)
    if flex_attention_takes(query) and not forest.exact:
        return attend_by_blocks(query, key, value, forest.block_mask(query.device), scale)
    paths = forest.paths if forest.exact else ()
    return SpanAttention.apply(query, key, value, forest.spans, paths, scale, kernel_for(query.device))


@contextmanager
def forest_attention_in(model: Any) -> Iterator[None]:
    """Within it, a transformers model computes with forest attention and needs the keyword `forest` in its forward;
    afterwards it computes as before. A module that is not transformers' must call `forest_attention` itself."""
    if not hasattr(model, "set_attn_implementation"):
        yield
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, forest_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
