"""Attention in which each query sees the tokens of its own path, in compiled code; see path_attention.cpp.

Shapes: H query heads, K key heads, T queries (tokens), L keys, D head width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upspiral.kernel.build import load

COLUMNS = 64
"""The most queries of one task: its tokens times the query heads that share a key head."""
_WIDTHS = range(16, 257, 16)
_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries [query_start, query_end), neighbours on one path, and what the last of them sees from the root on: runs
    (start, length) of keys, its own token last."""

    query_start: int
    query_end: int
    runs: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Segments cut into tasks of at most COLUMNS columns."""

    tasks: NDArray[np.int64]
    """[tasks, 5]: first token, tokens, first run, end of runs, position of the first token in its path"""
    runs: NDArray[np.int64]
    """[runs, 2]: start and length"""

    @classmethod
    def of(cls, segments: Sequence[Segment], group: int) -> Plan:
        """`group`: how many query heads share a key head."""
        most = COLUMNS // group
        tasks: list[tuple[int, int, int, int, int]] = []
        runs: list[tuple[int, int]] = []
        for segment in segments:
            first_run = len(runs)
            runs += segment.runs
            offset = sum(length for _, length in segment.runs) - segment.query_end
            for start in range(segment.query_start, segment.query_end, most):
                tokens = min(most, segment.query_end - start)
                tasks.append((start, tokens, first_run, len(runs), start + offset))
        return cls(np.array(tasks, np.int64).reshape(-1, 5), np.array(runs, np.int64).reshape(-1, 2))


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("query_heads", "key_heads", "tokens", "keys", "width")),
        ("scale", ctypes.c_float),
    )


class PathAttention:
    """The compiled forward and backward pass. Results do not depend, to the bit, on how queries are put together;
    gradients of keys and values depend on the number of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @staticmethod
    def takes(query: Tensor, key: Tensor) -> bool:
        """Whether it can compute these heads ([..., H, T, D] and [..., K, L, D])."""
        group, width = query.shape[-3] // key.shape[-3], query.shape[-1]
        known = query.dtype in _DTYPES and query.dtype == key.dtype and query.device.type == "cpu"
        return known and width in _WIDTHS and 1 <= group <= COLUMNS

    def forward(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
        """query [H,T,D], key and value [K,L,D] -> (output [H,T,D], in memory [T,H,D]; log-sum-exp [H,T], float32).
        Tokens in no segment get zeros."""
        heads, tokens, width = query.shape
        output, lse = query.new_zeros(tokens, heads, width), query.new_zeros(heads, tokens, dtype=torch.float32)
        given = [_gapless(tensor) for tensor in (query, key, value)]
        self._library.path_attention(
            *_arguments(given, plan, scale), ctypes.c_void_p(output.data_ptr()), ctypes.c_void_p(lse.data_ptr())
        )
        return output.transpose(0, 1), lse

    def decode(
        self, query: Tensor, keys_values: tuple[Tensor, Tensor], slots: Tensor, lengths: Tensor, scale: float
    ) -> Tensor:
        """query [B,H,D], keys and values [slots,K,L,D] with equal strides -> [B,H,D]: sequence b sees the first
        `lengths[b]` keys of slot `slots[b]` (both int64 on CPU). To the bit what `forward` gives."""
        keys, values = keys_values
        sequences, heads, width = query.shape
        query, output = _gapless(query), query.new_empty(sequences, heads, width)
        assert keys.stride() == values.stride() and keys.stride(-1) == 1
        shape = _Shape(heads, keys.shape[1], sequences, keys.shape[2], width, scale)
        pointers = (ctypes.c_void_p * 3)(*(tensor.data_ptr() for tensor in (query, keys, values)))
        strides = (ctypes.c_int64 * 5)(query.stride(1), query.stride(0), *keys.stride()[:3])
        self._library.decode_attention(
            ctypes.c_int(query.dtype == torch.bfloat16),
            ctypes.byref(shape),
            pointers,
            strides,
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (slots, lengths, output)),
        )
        return output

    def backward(
        self, qkv: tuple[Tensor, Tensor, Tensor], result: tuple[Tensor, Tensor], grad: Tensor, plan: Plan, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values from what `forward` took and gave and the gradient of its output."""
        (query, key, _), (output, lse) = qkv, result
        heads, tokens, width = query.shape
        grad_query = query.new_zeros(tokens, heads, width)
        grad_keys, grad_values = (torch.zeros(key.shape, dtype=torch.float32) for _ in range(2))
        given = [_gapless(tensor) for tensor in (*qkv, output, grad)]
        sums = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (lse, grad_query, grad_keys, grad_values))
        self._library.path_attention_gradients(*_arguments(given, plan, scale), *sums)
        return grad_query.transpose(0, 1), grad_keys.to(key.dtype), grad_values.to(key.dtype)


@cache
def path_attention() -> PathAttention | None:
    """None where it cannot be compiled or would not run; the log then says why."""
    library = load("path_attention")
    return None if library is None else PathAttention(library)


def _gapless(heads: Tensor) -> Tensor:
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _arguments(given: Sequence[Tensor], plan: Plan, scale: float) -> tuple[object, ...]:
    query, key = given[:2]
    shape = _Shape(query.shape[0], key.shape[0], query.shape[1], key.shape[1], query.shape[2], scale)
    pointers = (ctypes.c_void_p * len(given))(*(tensor.data_ptr() for tensor in given))
    strides = (ctypes.c_int64 * (2 * len(given)))(*(stride for tensor in given for stride in tensor.stride()[:2]))
    return (
        ctypes.c_int(query.dtype == torch.bfloat16),
        ctypes.byref(shape),
        plan.tasks.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(len(plan.tasks)),
        plan.runs.ctypes.data_as(ctypes.c_void_p),
        pointers,
        strides,
    )
