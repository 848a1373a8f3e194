"""Activation checkpointing: a decoder layer keeps its input alone and is computed again when its gradient is wanted.

Gradients keep their bits: the second forward pass is the first one over again, on the same weights and keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed_layers(model: Any) -> Iterator[None]:
    """Within it, the decoder layers of a causal language model compute this way; afterwards as before. `model` has
    `get_decoder().layers`, as those of transformers."""
    layers = model.get_decoder().layers
    for layer in layers:
        # transformers' own switch acts in training mode alone; the model stays in eval() as it sampled. Nothing in it
        # draws random numbers.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
