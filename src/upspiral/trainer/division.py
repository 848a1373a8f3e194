"""What ranks divide of a model with trainer.parallel.tensor. Needs no torch, so that a plan can ask."""

from __future__ import annotations

VOCABULARY_MULTIPLE = 128
"""Megatron's vocabulary is padded to a multiple of it, whatever the number of ranks, which must divide it."""


def divided_counts(kind: str, *, key_heads: int, experts: int, inner: int, experts_inner: int) -> dict[str, int]:
    """By what they are called, with this trainer.kind; `tensor` must divide each. 0: the model has none."""
    if kind == "megatron":
        return {
            "key heads": key_heads,
            "inner width": inner,
            "experts' inner width": experts_inner,
            "padded vocabulary": VOCABULARY_MULTIPLE,
        }
    return {"key heads": key_heads, "experts": experts}
