"""Products of trainer and exact engine: right, and where bits are promised, the same bits in any company."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upspiral.kernel.product import has_onednn, multiply, multiply_packed, packed, packing_keeps_bits

SIZES = st.sampled_from([0, 1, 2, 15, 16, 17, 64, 96])


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans())
def test_multiply_is_the_matrix_product(rows: int, width: int, outputs: int, turned: bool, weight_turned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(width, rows, generator=generator).mT if turned else torch.randn(rows, width, generator=generator)
    right = torch.randn(width, outputs, generator=generator)
    weight = right.mT if weight_turned else right.mT.contiguous()
    torch.testing.assert_close(multiply(left, weight), (left.double() @ right.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_company_where_packing_is_allowed(dtype: torch.dtype) -> None:
    if not has_onednn(torch.empty(0, dtype=dtype)):
        pytest.skip(f"oneDNN does not multiply {dtype} on this CPU")
    shape = (192, 96)
    if not packing_keeps_bits(shape, dtype):
        pytest.skip(
            "oneDNN adds up otherwise on this CPU once a weight is laid out; the exact engine does not pack then"
        )
    rows, weight = torch.randn(300, shape[1]).to(dtype), torch.randn(shape).to(dtype)
    whole, laid_out = multiply(rows, weight), packed(weight)
    for count in (16, 31, 64, 255):
        assert torch.equal(multiply(rows[-count:], weight), whole[-count:])
        assert torch.equal(multiply_packed(rows[:count].contiguous(), laid_out), whole[:count])
