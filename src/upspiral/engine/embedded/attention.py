"""Attention over slots, for decoding rows and for chunks of prompts.

Shapes: B slots, K key-value heads, G query heads that share one, H = K * G, T positions, D head size. Keys and values
are views of the cache; nothing is gathered. The G queries that share a key-value head stand where the positions of a
query sequence would.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from upspiral.engine.embedded.projection import has_onednn, multiply
from upspiral.engine.embedded.sharing import SharedRun, Sharing

_WORTH_BLOCKS_TOKENS = 128
_BLOCK_ROWS = 128


def attend_slots(
    queries_BHD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, mask_B11T: Tensor, sharing: Sharing
) -> Tensor:
    """One query position a slot. The mask is additive and hides what runs cover, too. Gives [B, H * D].

    Attention over disjoint sets of keys is the mean of attention over each, weighted by exp(logsumexp of the scores):
    shared runs are read once, for all queries below them, and joined with the tails. Each tail has a position.
    """
    queries = _by_key_value_head(queries_BHD, keys_BKTD)
    parts = [
        _attend(
            queries[span.first : span.last],
            keys_BKTD[span.first : span.last, :, span.begin : span.end],
            values_BKTD[span.first : span.last, :, span.begin : span.end],
            mask_B11T[span.first : span.last, ..., span.begin : span.end],
        )
        for span in sharing.spans
    ]
    attended, lse = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*parts, strict=True))
    if sharing.runs:
        attended = attended.float()
    for run in sharing.runs:
        _join_run(attended, lse, queries, keys_BKTD, values_BKTD, run)
    return attended.to(queries.dtype).flatten(1)


def attend_chunk(queries_THD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, mask_TT: Tensor | None) -> Tensor:
    """The chunk of a prompt that ends where the keys end. The mask is additive; None means that the chunk starts the
    prompt and is plainly causal. Gives [T, H * D]."""
    if keys_KTD.shape[1] >= _WORTH_BLOCKS_TOKENS and has_onednn(keys_KTD):
        return _attend_in_blocks(queries_THD, keys_KTD, values_KTD)
    attended = F.scaled_dot_product_attention(
        queries_THD.transpose(0, 1)[None],
        keys_KTD[None],
        values_KTD[None],
        attn_mask=mask_TT,
        is_causal=mask_TT is None,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).flatten(1)


def _attend_in_blocks(queries_THD: Tensor, keys_KLD: Tensor, values_KLD: Tensor) -> Tensor:
    """As `attend_chunk`. torch's kernel for CPU multiplies many small matrices where this multiplies few large ones:
    all queries of a block that share a key-value head at once. Scores are float32, as they are there."""
    count, heads, size = queries_THD.shape
    kv_heads, length, _ = keys_KLD.shape
    queries_KGTD = queries_THD.view(count, kv_heads, -1, size).permute(1, 2, 0, 3)
    scaled_KLD = keys_KLD.float() * size**-0.5
    attended = queries_THD.new_empty(count, kv_heads, heads // kv_heads, size)
    for begin in range(0, count, _BLOCK_ROWS):
        end = min(begin + _BLOCK_ROWS, count)
        seen = length - count + end
        later = torch.ones(end - begin, end - begin, dtype=torch.bool).triu_(1)
        for head in range(kv_heads):
            block_GTD = queries_KGTD[head, :, begin:end].float()
            scores = multiply(block_GTD.flatten(0, 1), scaled_KLD[head, :seen]).view(*block_GTD.shape[:2], seen)
            scores[..., seen - (end - begin) :].masked_fill_(later, float("-inf"))
            weights = scores.softmax(-1).to(values_KLD.dtype).flatten(0, 1)
            output_GTD = torch.mm(weights, values_KLD[head, :seen]).view_as(block_GTD)
            attended[begin:end, head] = output_GTD.transpose(0, 1)
    return attended.view(count, -1)


def _by_key_value_head(queries_BHD: Tensor, keys_BKTD: Tensor) -> Tensor:
    return queries_BHD.reshape(len(queries_BHD), keys_BKTD.shape[1], -1, keys_BKTD.shape[-1])


def _join_run(
    attended: Tensor, lse: Tensor, queries: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, run: SharedRun
) -> None:
    """Adds the run to what its members have attended to, in place."""
    asking = queries[run.members]
    members, kv_heads, group, size = asking.shape
    together = asking.transpose(0, 1).reshape(1, kv_heads, members * group, size)
    place = (slice(run.slot, run.slot + 1), slice(None), slice(run.begin, run.end))
    common, common_lse = _attend(together, keys_BKTD[place], values_BKTD[place], None)
    common = common.view(kv_heads, members, group, size).transpose(0, 1).float()
    common_lse = common_lse.view(kv_heads, members, group).transpose(0, 1)
    own_lse = lse[run.members]
    share = torch.sigmoid(common_lse - own_lse)[..., None]
    attended[run.members] = torch.lerp(attended[run.members], common, share)
    lse[run.members] = torch.logaddexp(own_lse, common_lse)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(attended, logsumexp of the scores in float32); elsewhere than on CPU, where nothing is joined, the latter is
    not known."""
    if queries.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask), queries
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, attn_mask=mask)
