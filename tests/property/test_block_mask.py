"""The block mask of a forest is its visibility, element by element, in the blocks that torch makes of a dense one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tests.property.forests import batches_of_rollouts
from upspiral.trainer.flex import block_mask_of
from upspiral.trainer.forest import ContextRun, ForestBatch, Item, pack


def visibility(batch: ForestBatch) -> Tensor:
    """[T, C + T], from the path of each node."""
    context = batch.context_length
    seen = torch.zeros(batch.num_tokens, context + batch.num_tokens, dtype=torch.bool)
    for node, (start, length) in enumerate(zip(batch.node_start_N, batch.node_length_N, strict=True)):
        above = node
        for query in range(start, start + length):
            seen[query, context + start : context + query + 1] = True
        while batch.node_parent_N[above] >= 0:
            above = batch.node_parent_N[above]
            first = context + batch.node_start_N[above]
            seen[start : start + length, first : first + batch.node_length_N[above]] = True
        if length:
            seen[start : start + length, : batch.positions_T[batch.node_start_N[above]]] = True
    return seen


def blocks(mask: BlockMask, kind: str) -> Tensor:
    """The table of blocks: queries by keys for "full_kv" and "kv", keys by queries for "full_q" and "q"."""
    counts, indices = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
    table = torch.zeros(indices.shape, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        table[row, indices[row, :count].long()] = True
    return table


def dense(mask: BlockMask, block: int) -> Tensor:
    """What the kernel makes of the mask: full blocks without looking, others by its function."""
    queries, keys = mask.seq_lengths
    mod: Any = mask.mask_mod
    looked_at = mod(0, 0, torch.arange(queries)[:, None], torch.arange(keys)[None])
    full, partial = (
        blocks(mask, kind).repeat_interleave(block, 0).repeat_interleave(block, 1)[:queries, :keys]
        for kind in ("full_kv", "kv")
    )
    assert not (full & partial).any()
    return full | (partial & looked_at)


def check(batch: ForestBatch, block: int) -> None:
    mask, wanted = block_mask_of(batch, "cpu", block), visibility(batch)
    assert torch.equal(dense(mask, block), wanted)
    reference = create_block_mask(mask.mask_mod, 1, 1, *wanted.shape, device="cpu", BLOCK_SIZE=block)
    for kind in ("full_kv", "kv", "full_q", "q"):
        ours, theirs = blocks(mask, kind), blocks(reference, kind)
        rows, columns = theirs.shape
        assert torch.equal(ours[:rows, :columns], theirs), kind
        assert not ours[rows:].any() and not ours[:, columns:].any()


@settings(max_examples=60, deadline=None)
@given(items=batches_of_rollouts(), budget=st.sampled_from([3, 8, 20, 1000]), block=st.sampled_from([1, 2, 4, 16]))
def test_the_mask_of_packed_rollouts_is_their_visibility(items: list[Item], budget: int, block: int) -> None:
    for batch in pack(items, tokens_per_microbatch=budget, lanes=2):
        check(batch, block)


@st.composite
def node_tables(draw: st.DrawFn) -> ForestBatch:
    """Any forest in preorder, below any context, with empty nodes and nodes of one token."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 9]), min_size=1, max_size=12).filter(any))
    context = draw(st.integers(0, 20))
    path: list[int] = []
    parents, depths, roots_left = [], [], context
    for node in range(len(lengths)):
        path = path[: draw(st.integers(0, len(path)))]
        parents.append(path[-1] if path else -1)
        if not path:
            # The first root hangs below the whole context, each other one as deep as the one before it or less.
            roots_left = draw(st.integers(0, roots_left)) if any(lengths[:node]) else context
        depths.append(depths[path[-1]] + lengths[path[-1]] if path else roots_left)
        path.append(node)
    positions = [depth + offset for depth, length in zip(depths, lengths, strict=True) for offset in range(length)]
    untrained: dict[str, Any] = {name: np.empty(0) for name in ForestBatch.__slots__ if name.endswith("_M")}
    return ForestBatch(
        token_ids_T=np.zeros(len(positions), np.int64),
        positions_T=np.array(positions, np.int64),
        routes_TLK=np.empty((len(positions), 0, 0), np.int16),
        node_start_N=np.cumsum([0, *lengths[:-1]]),
        node_length_N=np.array(lengths),
        node_parent_N=np.array(parents),
        rollout_ids=(),
        context=(ContextRun(0, 0, context),) if context else (),
        **untrained,
    )


@settings(max_examples=200, deadline=None)
@given(batch=node_tables(), block=st.sampled_from([1, 2, 4, 8, 16]))
def test_the_mask_of_any_node_table_is_its_visibility(batch: ForestBatch, block: int) -> None:
    check(batch, block)
