"""Forest attention in compiled code: the forest as segments for `kernel/path_attention.py`.

A *segment* is a stretch of tokens that follow each other on one path, with the runs of keys that it sees.

Shapes: H query heads, K key heads (H a multiple of K), T tokens, C tokens of the context, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from upspiral.kernel.path_attention import Segment
from upspiral.trainer.forest import ForestBatch


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


class SegmentAttention(torch.autograd.Function):
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
