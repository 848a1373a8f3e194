"""Forest attention in torch's own operations: the twin of the faster ways, and what is left where they do not run.

The forest as *spans*: a node's queries against its own keys, causal; and, because descendants follow a node directly,
the queries of all its descendants at once against the node's keys, unmasked. Each query then has one partial result per
node of its path. Partial softmaxes are merged by their log-sum-exp (as in FlashAttention, arXiv 2205.14135, section
3.1); backward, each span is differentiated with the *merged* result and log-sum-exp, which is exact because
probabilities are exp(score - log-sum-exp) whichever span the key is in.

Shapes: B = 1, H query heads, K key heads (H a multiple of K), T tokens, C tokens of the context, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from upspiral.trainer.forest import ForestBatch
from upspiral.weights.exact import exact_chunk


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
    ends = (batch.node_start_N + batch.node_length_N).tolist()
    subtree_ends = batch.subtree_end_N.tolist()
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
    """The same in plain matrix products, for any device: the twin that tests compare the fast kernel with, and on a GPU
    what FlexAttention does not take (`flex.py`). The scores of a span are held whole."""

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


class SpanAttention(torch.autograd.Function):
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
