"""Forest attention on a GPU: torch's FlexAttention with a block mask made from the node table.

Because nodes stand in depth-first preorder, the queries that see a key are neighbours: from the key itself to the end
of its node's subtree; for a key of the context, from the batch's first token to the first root that hangs above the
key. So two numbers a key are the whole mask, and their extremes over a block of keys tell which blocks of queries see
some of it and which all of it. No mask of tokens by tokens is made, neither here nor in the kernel.

FlexAttention's forward runs on a CPU too, which tests use; its backward does not.

Shapes: H query heads, K key heads (H a multiple of K), T tokens, L keys (the context's, then the batch's own), D head
width, R blocks of queries, S blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from upspiral.trainer.forest import ForestBatch

BLOCK = 128
"""Tokens of a block of queries and of one of keys; what FlexAttention's kernels divide in their own ways."""
_LEAST_WIDTH = 16
_DTYPES = (torch.bfloat16, torch.float32)


def flex_attention_takes(query: Tensor) -> bool:
    """Whether FlexAttention's kernels can compute these heads ([..., D]) with gradient."""
    return query.device.type == "cuda" and query.dtype in _DTYPES and query.shape[-1] >= _LEAST_WIDTH


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """query [1,H,T,D], key and value [1,K,L,D] -> [1,H,T,D]. Compiled at the first use in the process."""
    return _compiled()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=_OPTIONS)


_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
"""Short batches take the same kernel as long ones; torch's kernel for decoding would be compiled besides."""


@cache
def _compiled() -> Callable[..., Any]:
    # Lengths differ from batch to batch. Where it cannot be compiled, an error is better than what torch would do
    # instead: hold the scores of all queries and keys.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def block_mask_of(batch: ForestBatch, device: torch.device | str, block: int = BLOCK) -> BlockMask:
    """Which keys [L] the queries [T] see, in blocks of `block` by `block`."""
    first_L, end_L = viewers_of(batch)
    first_SB, end_SB = _in_blocks(first_L, block, filler=batch.num_tokens), _in_blocks(end_L, block, filler=0)
    start_R1 = np.arange(_num_blocks(batch.num_tokens, block))[:, None] * block
    # Some of the keys are seen by some of the queries, though the extremes may be those of different keys: a block of
    # own keys stands among the queries, or before or behind all of them; and where own keys share a block with the
    # context's, only the first queries can stand before them, and these see all of the context.
    seen_RS = (first_SB.min(1) < start_R1 + block) & (end_SB.max(1) > start_R1)
    full_RS = (first_SB.max(1) <= start_R1) & (end_SB.min(1) >= start_R1 + block)
    first, end = (torch.from_numpy(each).to(device, torch.int32) for each in (first_L, end_L))

    def sees(batch_index: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= first[key]) & (query < end[key])

    return BlockMask.from_kv_blocks(
        *_listed(seen_RS & ~full_RS, device),
        *_listed(full_RS, device),
        BLOCK_SIZE=block,
        mask_mod=sees,
        seq_lengths=(batch.num_tokens, len(first_L)),
    )


def viewers_of(batch: ForestBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each key [L] the first query that sees it, and the one behind the last; all between them see it too."""
    subtree_ends = batch.subtree_end_N
    roots = (batch.node_parent_N < 0) & (subtree_ends > batch.node_start_N)
    starts = batch.node_start_N[roots]
    depths, context = batch.positions_T[starts], np.arange(batch.context_length)
    assert not len(context) or (np.diff(depths) <= 0).all(), "in preorder, no root hangs deeper than one before it"
    behind_last = np.searchsorted(-depths, -context)  # the first root that hangs above a key, or the end
    first = np.concatenate([np.zeros_like(context), np.arange(batch.num_tokens)])
    end = np.concatenate(
        [np.append(starts, batch.num_tokens)[behind_last], np.repeat(subtree_ends, batch.node_length_N)]
    )
    return first, end


def _num_blocks(length: int, block: int) -> int:
    """At least two: for tables of a single block torch would compile everything once more."""
    return max(2, -(-length // block))


def _in_blocks(values_L: NDArray[np.int64], block: int, *, filler: int) -> NDArray[np.int64]:
    """[S, block], filled up with what a key that nobody sees would have."""
    missing = _num_blocks(len(values_L), block) * block - len(values_L)
    return np.pad(values_L, (0, missing), constant_values=filler).reshape(-1, block)


def _listed(table_RS: NDArray[np.bool_], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each row has [1,1,R], and which [1,1,R,S]: these in ascending order, then the others."""
    which = np.argsort(~table_RS, axis=1, kind="stable")
    counts, indices = (torch.from_numpy(each).to(device, torch.int32) for each in (table_RS.sum(1), which))
    return counts[None, None], indices[None, None]
