"""Multiplication with a weight of the trainer's, on CPU by a copy that oneDNN has laid out for it.

A weight as the trainer holds it is rearranged anew in every multiplication; for the few rows of a decoding step that
takes as long as the multiplication itself. And what torch takes for float32, MKL, runs at less than half speed on CPUs
of other makers. The copies cost the memory of the weights once more. They are given up while the trainer computes, for
it needs the memory, and made again when weights are published (measured for 135M parameters on one core: 0.2 s, steps
1.2 to 2 times as fast in bfloat16 and 2 to 2.5 in float32).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 32
"""For how many rows oneDNN is asked to lay weights out; one layout is as fast for 1 row as for 512."""


class Projection:
    """y = x W^T. Invariant: what it computes with is W as it was at the last `refresh`."""

    def __init__(self, weight: Tensor):
        """`weight`: [out, in], a parameter that others update in place. Call `refresh` before the first use, and before
        the next one after `release`."""
        self._weight = weight
        self._packs = _has_onednn(weight)
        self._packed = weight

    def refresh(self) -> None:
        """Takes over the weight's present values. Copies it where a copy is faster, else does nothing."""
        if self._packs:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight.detach(), _ROWS)

    def release(self) -> None:
        """Gives the copy's memory back."""
        self._packed = self._weight

    def __call__(self, rows: Tensor) -> Tensor:
        """[N, in] -> [N, out]. Rows have no gaps, or oneDNN takes a hundred times as long."""
        if self._packs:
            return torch.ops.mkldnn._linear_pointwise(rows, self._packed, None, "none", [], "")
        return F.linear(rows, self._weight)


def _has_onednn(tensor: Tensor) -> bool:
    """Whether oneDNN multiplies on this tensor's device and in its dtype."""
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if tensor.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return tensor.dtype == torch.float32
