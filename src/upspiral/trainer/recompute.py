"""Activation checkpointing: a decoder layer keeps its input alone and is computed again when its gradient is wanted.

Gradients keep their bits: the second forward pass is the first one over again, on the same weights and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint


def computed_again(layer: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that computes the same and keeps nothing but what it is called with."""
    # Nothing in a model that stays in eval() draws random numbers.
    return partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def recomputed_layers(layers: Sequence[Any]) -> Iterator[None]:
    """Within it, modules compute this way; afterwards as before, also where the gradient is still to come."""
    for layer in layers:
        layer.forward = computed_again(layer.forward)  # transformers' own switch acts in training mode alone
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
