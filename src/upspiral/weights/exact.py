"""Attention that gives a query the same bits whatever else is computed beside it.

Engine and trainer cut their work differently: one decodes many sequences at a time, the other computes trees. Kernels
that are fast add up in an order that depends on the cut. Here a query meets the keys of its path in blocks, from the
first on, one after the other; keys that it does not see add an exact zero. Every product is taken over a block or over
the head's width, in float32 and with at least LEAST_ROWS rows, because matrix libraries compute a few rows otherwise.

Shapes: S sets of keys (a sequence's, or one head's of it), M queries of a set, L keys, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
LEAST_ROWS = 16


def exact_attention(
    queries_SMD: Tensor, keys_SLD: Tensor, values_SLD: Tensor, seen_SM: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [S,M,D], log-sum-exp [S,M]) in float32 at least. A query sees the first `seen_SM` keys of its set, and at
    least one. S may stand for several leading dimensions."""
    rows = queries_SMD.shape[-2]
    wide = torch.float64 if queries_SMD.dtype == torch.float64 else torch.float32
    padding = max(0, LEAST_ROWS - rows)
    queries = F.pad(queries_SMD.to(wide), (0, 0, 0, padding))
    seen = F.pad(seen_SM, (0, padding), value=1)[..., None]
    output = torch.zeros_like(queries)
    top = torch.full(queries.shape[:-1], float("-inf"), dtype=wide, device=queries.device)[..., None]
    total = torch.zeros_like(top)
    offsets = torch.arange(BLOCK, device=queries.device)
    for start in range(0, int(seen_SM.max()), BLOCK):
        keys, values = (_block(tensor, start, wide) for tensor in (keys_SLD, values_SLD))
        scores = torch.matmul(queries, keys.transpose(-1, -2)).mul_(scale)
        scores.masked_fill_(start + offsets >= seen, float("-inf"))
        now = torch.maximum(top, scores.amax(-1, keepdim=True))
        shrink = (top - now).exp_()
        weights = scores.sub_(now).exp_()
        total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
        output = output.mul_(shrink).add_(torch.matmul(weights, values))
        top = now
    lse = (total.log() + top)[..., 0]
    return (output / total)[..., :rows, :], lse[..., :rows]


def exact_chunk(queries_KGMD: Tensor, keys_KLD: Tensor, values_KLD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output [K,G,M,D], log-sum-exp [K,G,M]) of the last M tokens of L, each of which sees those before it and itself.
    G query heads share each of K heads of keys."""
    group, count, length = queries_KGMD.shape[1], queries_KGMD.shape[2], keys_KLD.shape[1]
    seen_M = torch.arange(length - count, length, device=queries_KGMD.device) + 1
    seen = seen_M.repeat(group).expand(len(keys_KLD), -1)
    output, lse = exact_attention(queries_KGMD.flatten(1, 2), keys_KLD, values_KLD, seen, scale)
    return output.unflatten(1, (group, count)), lse.unflatten(1, (group, count))


def at_least_some_rows(rows: Tensor) -> Tensor:
    """Zeros behind rows, where there are fewer than LEAST_ROWS."""
    missing = LEAST_ROWS - len(rows)
    return rows if missing <= 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])


def _block(tensor: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """[S,BLOCK,D] of keys or values; zeros where there are none."""
    block = tensor[..., start : start + BLOCK, :].to(dtype)
    return F.pad(block, (0, 0, 0, BLOCK - block.shape[-2]))
