"""What a decoder layer does to each row by itself, in compiled code; see rows.cpp.

Shapes: T tokens, H heads, D width of a row. All tensors of a call have one dtype, bfloat16 or float32, except where
noted, and no gaps in their last dimension.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from upspiral.kernel.build import load


class _Extent(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("tokens", "heads", "width"))


class Rows:
    """A row's results do not depend, to the bit, on the rows beside it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def norm(self, rows_THD: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """RMS norm: (weight * rows / root mean square, [T, H] float32 by what the rows were multiplied)."""
        to = torch.empty(rows_THD.shape, dtype=rows_THD.dtype)
        scales_TH = torch.empty(rows_THD.shape[:2], dtype=torch.float32)
        self._library.norm_rows(
            *_head(rows_THD), _pointer(rows_THD), _pointer(weight_D), ctypes.c_float(epsilon), _pointer(to),
            _pointer(scales_TH), _strides(rows_THD, to),
        )  # fmt: skip
        return to, scales_TH

    def norm_gradients(
        self, rows_THD: Tensor, weight_D: Tensor, scales_TH: Tensor, grad_THD: Tensor, carried_THD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(gradient of the rows, with `carried_THD` added; gradient of the weight)."""
        to = torch.empty(rows_THD.shape, dtype=rows_THD.dtype)
        grad_weight = torch.zeros(weight_D.shape, dtype=torch.float32)
        carried = grad_THD if carried_THD is None else carried_THD
        self._library.norm_rows_gradients(
            *_head(rows_THD), _pointer(rows_THD), _pointer(weight_D), _pointer(scales_TH), _pointer(grad_THD),
            _pointer(carried_THD), _pointer(to), _pointer(grad_weight), _strides(rows_THD, grad_THD, carried, to),
        )  # fmt: skip
        return to, grad_weight.to(weight_D.dtype)

    def rotate(self, rows_THD: Tensor, angles: tuple[Tensor, Tensor], to_THD: Tensor, *, back: bool = False) -> None:
        """RoPE by `angles`, cosines and sines [T, D] without gaps, or the same turned back; may be done in place."""
        cosines_TD, sines_TD = angles
        self._library.rotate_rows(
            *_head(rows_THD), _pointer(rows_THD), _pointer(cosines_TD), _pointer(sines_TD),
            ctypes.c_float(-1.0 if back else 1.0), _pointer(to_THD), _strides(rows_THD, to_THD),
        )  # fmt: skip

    def gate(self, rows_TD: Tensor) -> Tensor:
        """silu(first half) * second half -> [T, D / 2]. `rows_TD` has no gaps."""
        to = rows_TD.new_empty(rows_TD.shape[0], rows_TD.shape[1] // 2)
        self._library.gate_rows(*_head(to[:, None]), _pointer(rows_TD), _pointer(to))
        return to

    def gate_gradients(self, rows_TD: Tensor, grad: Tensor) -> Tensor:
        """Of `gate`'s argument, [T, D]. Neither has gaps."""
        to = torch.empty_like(rows_TD)
        self._library.gate_rows_gradients(*_head(grad[:, None]), _pointer(rows_TD), _pointer(grad), _pointer(to))
        return to


@cache
def rows() -> Rows | None:
    """None where it cannot be compiled or would not run; the log then says why."""
    library = load("rows")
    return None if library is None else Rows(library)


def _head(rows_THD: Tensor) -> tuple[object, object]:
    extent = _Extent(*rows_THD.shape)
    return ctypes.c_int(rows_THD.dtype == torch.bfloat16), ctypes.byref(extent)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def _strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    both = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    return (ctypes.c_int64 * len(both))(*both)
