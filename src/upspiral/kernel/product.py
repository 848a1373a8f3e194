"""Products with a weight as it lies, for trainer and exact engine alike: in float32 on a CPU by oneDNN.

What torch takes for float32, MKL, runs at less than half of that speed on CPUs of other makers (AMD, one core, 1,024
rows of 576 by 3,072: 96 to 110 against 207 to 248 GFLOP/s, forward and both gradients). For bfloat16 torch takes oneDNN
itself.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_PACKED_FOR_ROWS = 32
"""For how many rows oneDNN is asked to lay weights out; one layout is as fast for 1 row as for 512."""
_LEAST_SIZE = 16
"""oneDNN refuses some smaller products, and one row gets other bits than many (`weights/exact.py`)."""
_TRIED_ROWS = (16, 33, 130)


def multiply(rows: Tensor, weight: Tensor) -> Tensor:
    """[N, in] times the transpose of [out, in] -> [N, out]; no gradient. Either may be a transposed view."""
    if rows.dtype == torch.float32 and min(*rows.shape, len(weight)) >= _LEAST_SIZE and has_onednn(rows):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return rows @ weight.mT


def has_onednn(tensor: Tensor) -> bool:
    """Whether oneDNN multiplies on this tensor's device and in its dtype."""
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if tensor.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return tensor.dtype == torch.float32


def packed(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] that oneDNN has laid out for itself."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_FOR_ROWS)


def multiply_packed(rows: Tensor, weight: Tensor) -> Tensor:
    """By a `packed` one. Rows have no gaps, or oneDNN takes a hundred times as long."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


@cache
def packing_keeps_bits(shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether `multiply_packed` gives the bits of `multiply` on this machine, tried with a random weight [out, in]: it
    is for oneDNN to choose how it adds up. Exact sampling relies on it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    rows = torch.randn(max(_TRIED_ROWS), shape[1], generator=generator).to(dtype)
    laid_out, whole = packed(weight), multiply(rows, weight)
    return all(
        torch.equal(multiply_packed(rows[:count], laid_out), whole[:count])
        and torch.equal(multiply(rows[:count], weight), whole[:count])
        for count in _TRIED_ROWS
    )
