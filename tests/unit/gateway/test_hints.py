"""What headers say."""

from __future__ import annotations

import pytest

from upspiral.gateway.hints import hints_of


@pytest.mark.parametrize(
    ("stainless", "ours", "retry"),
    [("0", "1", 1), ("2", "0", 2), ("", "3", 3), ("1", "", 1), ("no", "4", 4), ("99999999", "-1", 0), ("", "", 0)],
)
def test_either_marker_makes_a_retry(stainless: str, ours: str, retry: int) -> None:
    """SDKs of Stainless send a 0 with every first request, whatever an agent's own loop adds."""
    headers = {"x-stainless-retry-count": stainless, "x-upspiral-retry": ours}
    assert hints_of({name: value for name, value in headers.items() if value}).retry == retry
