"""Attention over slots, for decoding rows and for chunks of prompts.

Shapes: B slots, K key-value heads, G query heads that share one, H = K * G, T positions, D head size. Keys and values
are views of the cache; nothing is gathered. The G queries that share a key-value head stand where the positions of a
query sequence would.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_slots(queries_BHD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, mask_B11T: Tensor) -> Tensor:
    """One query position a slot. The mask is additive. Gives [B, H * D]."""
    queries = _by_key_value_head(queries_BHD, keys_BKTD)
    return F.scaled_dot_product_attention(queries, keys_BKTD, values_BKTD, attn_mask=mask_B11T).flatten(1)


def attend_slots_sharing(
    queries_BHD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, mask_B11T: Tensor, shared: tuple[int, int]
) -> Tensor:
    """As `attend_slots`, for slots whose first positions hold the same keys and values: shared = (how many, a slot).

    On CPU the cost of attention is reading keys and values, so the common prefix (the system prompt and tools of every
    rollout) is read once, for all queries, and joined with the rest by the softmax identity: attention over two
    disjoint sets is their mean weighted by exp(logsumexp of the scores). Each slot must see a position beyond the
    prefix.
    """
    count, slot = shared
    queries = _by_key_value_head(queries_BHD, keys_BKTD)
    slots, kv_heads, group, size = queries.shape
    together = queries.transpose(0, 1).reshape(1, kv_heads, slots * group, size)
    common, common_lse = _flash(together, keys_BKTD[slot, None, :, :count], values_BKTD[slot, None, :, :count], None)
    common = common.view(kv_heads, slots, group, size).transpose(0, 1).float()
    common_lse = common_lse.view(kv_heads, slots, group).transpose(0, 1)
    own, own_lse = _flash(queries, keys_BKTD[:, :, count:], values_BKTD[:, :, count:], mask_B11T[..., count:])
    joined = torch.lerp(own.float(), common, torch.sigmoid(common_lse - own_lse)[..., None])
    return joined.to(queries.dtype).flatten(1)


def attend_chunk(queries_THD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, mask_TT: Tensor | None) -> Tensor:
    """The chunk of a prompt that ends where the keys end. The mask is additive; None means that the chunk starts the
    prompt and is plainly causal. Gives [T, H * D]."""
    attended = F.scaled_dot_product_attention(
        queries_THD.transpose(0, 1)[None],
        keys_KTD[None],
        values_KTD[None],
        attn_mask=mask_TT,
        is_causal=mask_TT is None,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1).flatten(1)


def _by_key_value_head(queries_BHD: Tensor, keys_BKTD: Tensor) -> Tensor:
    return queries_BHD.reshape(len(queries_BHD), keys_BKTD.shape[1], -1, keys_BKTD.shape[-1])


def _flash(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention runs on CPU, and besides the logsumexp of the scores in float32."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, attn_mask=mask)
