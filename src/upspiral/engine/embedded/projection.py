"""Multiplication with a weight of the trainer's, on CPU by a copy that oneDNN has laid out for it.

A weight as the trainer holds it is rearranged anew in every multiplication; for the few rows of a decoding step that
takes as long as the multiplication itself. The copies cost the memory of the weights once more. They are given up while
the trainer computes, for it needs the memory, and made again when weights are published (measured for 135M parameters
on one core: 0.2 s, steps 1.2 to 2 times as fast in bfloat16).
"""

from __future__ import annotations

from torch import Tensor

from upspiral.kernel.product import has_onednn, multiply, multiply_packed, packed, packing_keeps_bits


class Projection:
    """y = x W^T. Invariant: what it computes with is W as it was at the last `refresh`."""

    def __init__(self, weight: Tensor, *, exact: bool = False):
        """`weight`: [out, in], a parameter that others update in place. Call `refresh` before the first use, and before
        the next one after `release`. `exact`: to the bits of `kernel.product.multiply`, without a copy where that would
        change them."""
        self._weight = weight
        self._packs = has_onednn(weight) and (not exact or packing_keeps_bits((*weight.shape,), weight.dtype))
        self._packed = weight

    def refresh(self) -> None:
        """Takes over the weight's present values. Copies it where a copy is faster, else does nothing."""
        if self._packs:
            self._packed = packed(self._weight)

    def release(self) -> None:
        """Gives the copy's memory back."""
        self._packed = self._weight

    def __call__(self, rows: Tensor) -> Tensor:
        """[N, in] -> [N, out]. Rows have no gaps, or oneDNN takes a hundred times as long."""
        return multiply_packed(rows, self._packed) if self._packs else multiply(rows, self._weight)
