"""Charts: ticks that cover, points where they belong, gaps where nothing was measured."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upspiral.dashboard.chart import Axis, Series, interval_track, line_chart, nice_ticks, stacked_bars


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_range_and_are_few(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    slack = (high - low) * 1e-6 + 1e-9
    assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 8
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5])
def test_a_constant_still_gets_an_axis(value: float) -> None:
    ticks = nice_ticks(value, value)
    assert ticks[0] <= value <= ticks[-1] and len(ticks) >= 2


def test_a_line_breaks_where_a_value_is_missing() -> None:
    chart = line_chart([1, 2, 3, 4, 5], [Series("x", [0.1, 0.2, None, 0.4, 0.5])])
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 4


def test_bands_stay_inside_the_chart() -> None:
    chart = line_chart([0, 10], [Series("x", [0.3, 0.7], 1, [0.2, 0.6], [0.4, 0.8])], Axis(percent=True, low=0, high=1))
    points = re.search(r'<polygon class="s1 band" points="([^"]*)"', chart)
    assert points is not None
    ys = [float(pair.split(",")[1]) for pair in points.group(1).split()]
    assert len(ys) == 4 and all(0 <= y <= 210 for y in ys)


def test_bars_stack_to_their_total() -> None:
    chart = stacked_bars([1, 2], [Series("a", [1, 2], 1), Series("b", [3, None], 2)])
    heights = [float(height) for height in re.findall(r'class="s\d fill".*?height="([\d.]+)"', chart)]
    assert heights == pytest.approx([43.5, 3 * 43.5, 2 * 43.5], rel=0.02), "a, b and a again"


def test_nothing_measured_draws_nothing() -> None:
    assert line_chart([1, 2], [Series("x", [None, None])]) == ""
    assert line_chart([], []) == ""
    assert stacked_bars([], []) == ""


def test_ticks_of_small_shares_differ() -> None:
    chart = line_chart([1, 2], [Series("x", [0.0, 0.01])], Axis(percent=True, low=0.0))
    ticks = re.findall(r">([\d.]+) %<", chart)
    assert len(set(ticks)) == len(ticks) > 2


def test_names_are_escaped() -> None:
    chart = line_chart([1], [Series('"><script>', [1.0])])
    assert "<script>" not in chart


def test_an_interval_track_places_rates_in_order() -> None:
    track = interval_track([(0.2, 0.1, 0.3, 5), (0.8, 0.7, 0.9, 1)])
    before, after = (float(x) for x in re.findall(r'cx="([\d.]+)"', track))
    assert before < after
