"""Intervals against published values, and the laws that any such interval keeps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upspiral.eval.statistics import difference_interval, paired_difference_interval, wilson_interval

counts = st.integers(1, 400).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials)))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998 (two-sided intervals for the single proportion), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_the_published_table(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("second", "first", "low", "high"),
    # Newcombe 1998 (independent proportions), table II, method 10.
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_unpaired_difference_matches_the_published_table(
    second: tuple[int, int], first: tuple[int, int], low: float, high: float
) -> None:
    assert difference_interval(first, second) == pytest.approx((low, high), abs=5e-5)


def test_paired_difference_matches_the_published_table() -> None:
    # Newcombe 1998 (paired data), table III, method 10: 36 both, 12 and 2 discordant, 0 neither.
    assert paired_difference_interval(36, 2, 12, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@given(counts)
def test_wilson_contains_the_rate_and_stays_in_the_unit_interval(count: tuple[int, int]) -> None:
    low, high = wilson_interval(*count)
    assert 0 <= low <= count[0] / count[1] <= high <= 1
    assert low < high


@given(counts)
def test_wilson_is_symmetric_in_success_and_failure(count: tuple[int, int]) -> None:
    low, high = wilson_interval(*count)
    assert wilson_interval(count[1] - count[0], count[1]) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(counts, counts)
def test_swapping_the_samples_negates_the_difference(first: tuple[int, int], second: tuple[int, int]) -> None:
    low, high = difference_interval(first, second)
    assert low <= second[0] / second[1] - first[0] / first[1] <= high
    assert difference_interval(second, first) == pytest.approx((-high, -low), abs=1e-12)


@given(st.tuples(*[st.integers(0, 100)] * 4).filter(any))
def test_paired_interval_contains_the_difference(cells: tuple[int, int, int, int]) -> None:
    _, first_only, second_only, _ = cells
    low, high = paired_difference_interval(*cells)
    difference = (second_only - first_only) / sum(cells)
    assert -1 - 1e-9 <= low <= difference + 1e-12 and difference - 1e-12 <= high <= 1 + 1e-9


def test_pairing_narrows_the_interval_when_outcomes_agree() -> None:
    paired = paired_difference_interval(both=80, first_only=2, second_only=40, neither=78)
    unpaired = difference_interval((82, 200), (120, 200))
    assert paired[1] - paired[0] < unpaired[1] - unpaired[0]


def test_no_trials_means_nothing_is_known() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert difference_interval((0, 0), (3, 4)) == (-1.0, 1.0)


@pytest.mark.parametrize(("successes", "trials", "confidence"), [(5, 4, 0.95), (-1, 4, 0.95), (1, 4, 1.0), (1, 4, 95)])
def test_impossible_input_is_refused(successes: int, trials: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="must lie"):
        wilson_interval(successes, trials, confidence)
