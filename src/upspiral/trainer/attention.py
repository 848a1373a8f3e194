"""Forest attention: each token attends to its own path, without a mask of tokens by tokens.

Where it can be compiled, the kernel of `kernel/path_attention.py` does it: a *segment* is a stretch of tokens that
follow each other on one path, with the runs of keys that it sees.

Elsewhere torch does it in *spans*: a node's queries against its own keys, causal; and, because descendants follow a
node directly, the queries of all its descendants at once against the node's keys, unmasked. Each query then has one
partial result per node of its path. Partial softmaxes are merged by their log-sum-exp (as in FlashAttention, arXiv
2205.14135, section 3.1); backward, each span is differentiated with the *merged* result and log-sum-exp, which is exact
because probabilities are exp(score - log-sum-exp) whichever span the key is in.

Registered with transformers as "upspiral_forest"; a `ForestPass` travels to it as the keyword `forest` of the forward
pass. Keys and values of a batch's context stand before its own.
Shapes: B = 1, H query heads, K key heads (H a multiple of K), T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from upspiral.kernel.path_attention import PathAttention, Plan, Segment, path_attention
from upspiral.trainer.forest import ForestBatch
from upspiral.weights.exact import exact_chunk

ATTENTION_NAME = "upspiral_forest"


def segments_of(batch: ForestBatch) -> list[Segment]:
    """The forest as segments, each as long as it can be. Keys are counted from the context's first."""
    context, positions, parents = batch.context_length, batch.positions_T, batch.node_parent_N.tolist()
    paths: list[list[tuple[int, int]]] = []
    """Of each node, the runs from the root down to its own end."""
    bounds: list[tuple[int, int]] = []
    """Of each segment, its first token and its last node."""
    for node, (start, length) in enumerate(zip(batch.node_start_N.tolist(), batch.node_length_N.tolist(), strict=True)):
        parent = parents[node]
        above = paths[parent] if parent >= 0 else [(0, int(positions[start]))]
        paths.append(_with_run(above, context + start, length))
        if parent >= 0 and parent == node - 1:
            bounds[-1] = (bounds[-1][0], node)
        else:
            bounds.append((start, node))
    ends = (batch.node_start_N + batch.node_length_N).tolist()
    return [Segment(start, ends[last], paths[last]) for start, last in bounds]


def _with_run(runs: list[tuple[int, int]], start: int, length: int) -> list[tuple[int, int]]:
    *before, (last_start, last_length) = runs
    if last_length == 0:
        return [*before, (start, length)]
    if last_start + last_length == start:
        return [*before, (last_start, last_length + length)]
    return [*runs, (start, length)]


@dataclass(frozen=True, slots=True)
class Span:
    """Queries [query_start, query_end) against keys [key_start, key_end)."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    causal: bool
    """True for a node's own tokens, where query and key ranges are the same."""


def spans_of(batch: ForestBatch) -> tuple[Span, ...]:
    """The spans of a forest; own spans come before those of ancestors. Keys are counted from the context's first."""
    context = batch.context_length
    starts = batch.node_start_N.tolist()
    ends = [start + length for start, length in zip(starts, batch.node_length_N.tolist(), strict=True)]
    subtree_ends = list(ends)
    for node in range(len(starts) - 1, -1, -1):
        parent = int(batch.node_parent_N[node])
        if parent >= 0:
            subtree_ends[parent] = max(subtree_ends[parent], subtree_ends[node])
    own = [Span(start, end, context + start, context + end, True) for start, end in zip(starts, ends, strict=True)]
    below = [
        Span(end, subtree_end, context + start, context + end, False)
        for start, end, subtree_end in zip(starts, ends, subtree_ends, strict=True)
        if subtree_end > end
    ]
    hanging = [
        Span(start, subtree_end, 0, int(batch.positions_T[start]), False)
        for start, subtree_end, parent in zip(starts, subtree_ends, batch.node_parent_N.tolist(), strict=True)
        if parent < 0 and batch.positions_T[start] > 0
    ]
    return (*own, *below, *hanging)


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Queries [query_start, query_end) and all keys from the root of their node's path to the last of them."""

    query_start: int
    query_end: int
    keys: Tensor
    """[L] places, counted from the context's first."""


def paths_of(batch: ForestBatch) -> tuple[Path, ...]:
    paths: list[Path] = []
    context, parents = batch.context_length, batch.node_parent_N.tolist()
    for node, start in enumerate(batch.node_start_N.tolist()):
        end = start + int(batch.node_length_N[node])
        above = torch.arange(int(batch.positions_T[start])) if parents[node] < 0 else paths[parents[node]].keys
        paths.append(Path(start, end, torch.cat([above, torch.arange(context + start, context + end)])))
    return tuple(paths)


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
        ends = [(loss, None)] if loss is not None and loss.requires_grad else []
        self._keeps = False  # what is computed again from here on has nothing below it any more
        for layer in self.kept.values():
            pairs = zip(layer.computed, layer.leaves, strict=True)
            ends += [(computed, leaf.grad) for computed, leaf in pairs if leaf.grad is not None]
        self.kept.clear()
        if ends:
            torch.autograd.backward([end for end, _ in ends], [grad for _, grad in ends])

    @staticmethod
    def _leaves(earlier: ForestPass | None, layer: int) -> tuple[Tensor, Tensor]:
        assert earlier is not None, "a batch needs the passes of its context"
        return earlier.kept[layer].leaves


class Kernel(Protocol):
    """Attention of one span. `forward` returns (output [B,H,T,D], log-sum-exp [B,H,T]); `backward` the gradients of
    queries, keys and values, given the output and log-sum-exp over *all* keys of each query. `backward_dtype` says in
    which dtype `backward` wants its tensors."""

    def backward_dtype(self, dtype: torch.dtype) -> torch.dtype: ...

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        merged: tuple[Tensor, Tensor],
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class FlashCpuKernel:
    """torch's blocked CPU attention; it takes grouped heads as they are. Its bfloat16 backward takes up to three times
    as long as the float32 one on short nodes (measured: 165 tokens, 9 heads of 64), so that one is used for both."""

    def backward_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return _accumulator(dtype)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)

    def backward(
        self,
        grad: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        merged: tuple[Tensor, Tensor],
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, *qkv, *merged, 0.0, causal, scale=scale
        )


class PlainKernel:
    """The same in plain matrix products, for any device; the twin that tests compare the fast kernel with."""

    def backward_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        scores = self._scores(query, key, causal, scale)
        lse = scores.logsumexp(-1)
        output = (scores - lse[..., None]).exp() @ _spread(value, query).to(scores.dtype)
        return output.to(query.dtype), lse

    def backward(
        self,
        grad: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        merged: tuple[Tensor, Tensor],
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = qkv
        output, lse = merged
        probabilities = (self._scores(query, key, causal, scale) - lse[..., None]).exp()
        grad = grad.to(probabilities.dtype)
        grad_value = probabilities.mT @ grad
        delta = (grad * output).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad @ _spread(value, query).to(grad.dtype).mT - delta) * scale
        grad_key = grad_scores.mT @ query.to(grad.dtype)
        return grad_scores @ _spread(key, query).to(grad.dtype), _gather(grad_key, key), _gather(grad_value, value)

    @staticmethod
    def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
        scores = (query @ _spread(key, query).mT).to(_accumulator(query.dtype)) * scale
        if causal:
            length = scores.shape[-1]
            hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores


def kernel_for(device: torch.device) -> Kernel:
    return FlashCpuKernel() if device.type == "cpu" else PlainKernel()


def attend_exactly(
    query: Tensor, key: Tensor, value: Tensor, paths: Sequence[Path], scale: float
) -> tuple[Tensor, Tensor]:
    """(output [1,H,T,D], log-sum-exp [1,H,T]), each path for itself and in its order."""
    grouped = query[0].unflatten(0, (key.shape[1], -1))
    parts = [
        exact_chunk(
            grouped[:, :, path.query_start : path.query_end], key[0, :, path.keys], value[0, :, path.keys], scale
        )
        for path in paths
    ]
    output, lse = (torch.cat(each, dim=2).flatten(0, 1) for each in zip(*parts, strict=True))
    missing = query.shape[2] - paths[-1].query_end  # rows that only fill up
    return F.pad(output, (0, 0, 0, missing))[None], F.pad(lse, (0, missing))[None]


def attend_by_spans(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scale: float, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """(output [1,H,T,D], log-sum-exp [1,H,T]), partial results merged."""
    output = torch.zeros(query.shape, dtype=_accumulator(query.dtype), device=query.device)
    lse = torch.full(query.shape[:-1], float("-inf"), dtype=output.dtype, device=query.device)
    for span in spans:
        part, part_lse = kernel.forward(*_slices(span, query, key, value), span.causal, scale)
        own_output, own_lse = (tensor[:, :, span.query_start : span.query_end] for tensor in (output, lse))
        if span.causal:  # comes first and fills its rows
            own_output.copy_(part)
            own_lse.copy_(part_lse)
        else:
            merged = torch.logaddexp(own_lse, part_lse)
            own_output.mul_((own_lse - merged).exp_()[..., None])
            own_output.addcmul_(part, (part_lse - merged).exp_()[..., None])
            own_lse.copy_(merged)
    return output, lse


class ForestAttention(torch.autograd.Function):
    """apply(query [1,H,T,D], key [1,K,C+T,D], value [1,K,C+T,D], spans, paths, scale, kernel) -> [1,H,T,D]. With paths
    the forward is exact; the backward, which nobody compares with an engine, goes by spans either way."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, spans, paths, scale, kernel = inputs
        if paths:
            output, lse = attend_exactly(query, key, value, paths, scale)
        else:
            output, lse = attend_by_spans(query, key, value, spans, scale, kernel)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.spans, ctx.scale, ctx.kernel = spans, scale, kernel
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *saved, lse = ctx.saved_tensors
        dtype, accumulator = saved[0].dtype, _accumulator(saved[0].dtype)
        wanted = ctx.kernel.backward_dtype(dtype)
        query, key, value, output, grad = (tensor.to(wanted) for tensor in (*saved, grads[0]))
        sums = [torch.zeros(x.shape, dtype=accumulator, device=x.device) for x in (query, key, value)]
        for span in ctx.spans:
            rows = slice(span.query_start, span.query_end)
            keys = slice(span.key_start, span.key_end)
            merged = (output[:, :, rows], lse[:, :, rows].contiguous())
            qkv = _slices(span, query, key, value)
            parts = ctx.kernel.backward(grad[:, :, rows], qkv, merged, span.causal, ctx.scale)
            for total, part, where in zip(sums, parts, (rows, keys, keys), strict=True):
                total[:, :, where] += part
        return (*(total.to(dtype) for total in sums), None, None, None, None)


class CompiledForestAttention(torch.autograd.Function):
    """apply(query [1,H,T,D], key [1,K,C+T,D], value [1,K,C+T,D], plan, scale, compiled) -> [1,H,T,D]"""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, plan, scale, compiled = inputs
        output, lse = compiled.forward(query[0], key[0], value[0], plan, scale)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.plan, ctx.scale, ctx.compiled = plan, scale, compiled
        return output[None]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, output, lse = ctx.saved_tensors
        parts = ctx.compiled.backward((query[0], key[0], value[0]), (output, lse), grads[0][0], ctx.plan, ctx.scale)
        return (*(part[None] for part in parts), None, None, None)


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
        return CompiledForestAttention.apply(query, key, value, plan, scale, compiled)
    kernel = kernel_for(query.device)
    paths = forest.paths if forest.exact else ()
    return ForestAttention.apply(query, key, value, forest.spans, paths, scale, kernel)


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


def _slices(span: Span, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = slice(span.key_start, span.key_end)
    return query[:, :, span.query_start : span.query_end], key[:, :, keys], value[:, :, keys]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Sums are kept in float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spread(grouped: Tensor, query: Tensor) -> Tensor:
    """[1,K,T,D] -> [1,H,T,D]: each key head once for every query head of its group."""
    return grouped.repeat_interleave(query.shape[1] // grouped.shape[1], dim=1)


def _gather(spread: Tensor, like: Tensor) -> Tensor:
    """The gradient of `_spread`."""
    return spread.unflatten(1, (like.shape[1], -1)).sum(2)
