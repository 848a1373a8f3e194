"""Charts as inline SVG. Colours are CSS variables of the page, so that they follow its light and dark theme.

Every chart carries what its hover needs as JSON in `data-hover`: x positions in SVG units and rows to show.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

from markupsafe import Markup

Number = float | int
Values = Sequence[Number | None]

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 10, 26


@dataclass(frozen=True, slots=True)
class Series:
    """A line over x. `low` and `high`, when given, draw its band. `colour` 1 to 6 picks a colour of the page."""

    name: str
    values: Values
    colour: int = 1
    low: Values | None = None
    high: Values | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """How y values are shown. `digits` are those of the hover; ticks take as few as they need."""

    percent: bool = False
    low: float | None = None
    high: float | None = None
    digits: int = 3

    def show(self, value: Number) -> str:
        return f"{100 * value:.1f} %" if self.percent else f"{value:,.{self.digits}f}"

    def tick(self, value: Number) -> str:
        return f"{100 * value:.4g} %" if self.percent else f"{value:,.6g}"


@dataclass(frozen=True, slots=True)
class Size:
    """In SVG units, which are CSS pixels at full width."""

    width: int = 500
    height: int = 210


@dataclass(frozen=True, slots=True)
class _Frame:
    """Data coordinates to SVG coordinates."""

    size: Size
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: Number) -> float:
        span = (self.x_high - self.x_low) or 1.0
        return round(_LEFT + (value - self.x_low) / span * (self.size.width - _LEFT - _RIGHT), 1)

    def y(self, value: Number) -> float:
        span = (self.y_high - self.y_low) or 1.0
        inner = self.size.height - _TOP - _BOTTOM
        return round(_TOP + (1 - (value - self.y_low) / span) * inner, 1)


def line_chart(
    xs: Sequence[int], series: Sequence[Series], axis: Axis | None = None, size: Size | None = None
) -> Markup:
    """Lines over steps, with bands. Gaps where a value is None. Empty markup when there is nothing to draw."""
    axis, size = axis or Axis(), size or Size()
    shown = [
        value
        for one in series
        for values in (one.values, one.low, one.high)
        for value in values or ()
        if value is not None
    ]
    if not shown:
        return Markup("")
    low = min(shown) if axis.low is None else min(axis.low, *shown)
    high = max(shown) if axis.high is None else max(axis.high, *shown)
    ticks = nice_ticks(low, high)
    frame = _Frame(size, min(xs), max(xs), min(low, ticks[0]), max(high, ticks[-1]))
    parts = [_grid(frame, ticks, axis), _x_axis(frame, xs)]
    parts += [_band(frame, xs, one) for one in series if one.low is not None and one.high is not None]
    parts += [_line(frame, xs, one) for one in series]
    hover = [{"x": frame.x(x), "title": f"step {x}", "rows": _rows(series, index, axis)} for index, x in enumerate(xs)]
    return _svg(size, Markup("").join(parts), hover)


def stacked_bars(
    xs: Sequence[int], series: Sequence[Series], axis: Axis | None = None, size: Size | None = None
) -> Markup:
    """One bar a step, the parts of a whole stacked from the bottom; None counts as 0."""
    axis, size = axis or Axis(), size or Size()
    totals = [sum(one.values[index] or 0 for one in series) for index in range(len(xs))]
    if not totals or max(totals) <= 0:
        return Markup("")
    ticks = nice_ticks(0, max(totals))
    frame = _Frame(size, min(xs) - 0.6, max(xs) + 0.6, 0, max(ticks[-1], max(totals)))
    width = max((frame.x(1) - frame.x(0)) * 0.72, 1.0)
    width = min(width, 46.0)
    bars: list[Markup] = []
    for index, x in enumerate(xs):
        base = 0.0
        for one in series:
            value = one.values[index] or 0
            bars.append(_bar(frame, x, base, base + value, width, one.colour))
            base += value
    hover = [
        {
            "x": frame.x(x),
            "title": f"step {x}",
            "rows": [*_rows(series, index, axis), ["total", axis.show(totals[index]), 0]],
        }
        for index, x in enumerate(xs)
    ]
    parts = [_grid(frame, ticks, axis), _x_axis(frame, xs), *bars]
    return _svg(size, Markup("").join(parts), hover)


def interval_track(rows: Sequence[tuple[float, float, float, int]], width: int = 260) -> Markup:
    """Rates on a track from 0 to 100 %: (rate, low, high, colour) each, the first joined to the last."""
    height, pad = 10 + 9 * len(rows), 8
    inner = width - 2 * pad

    def x(rate: float) -> float:
        return round(pad + rate * inner, 1)

    lines = Markup("").join(
        Markup('<line class="gridline" x1="{0}" x2="{0}" y1="0" y2="{1}"/>').format(x(mark), height)
        for mark in (0, 0.25, 0.5, 0.75, 1)
    )
    marks = Markup("").join(
        Markup(
            '<line class="s{c} whisker" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
            '<circle class="s{c} dot" cx="{x}" cy="{y}" r="4"/>'
        ).format(c=colour, low=x(low), high=x(high), x=x(rate), y=9.5 + 9 * index)
        for index, (rate, low, high, colour) in enumerate(rows)
    )
    return Markup(
        '<svg class="track" viewBox="0 0 {w} {h}" width="{w}" height="{h}" aria-hidden="true">{a}{b}</svg>'
    ).format(w=width, h=height, a=lines, b=marks)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high], some `about` of them, ascending."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
        low, high = (low - span / 2, high + span / 2) if low < 0 else (0.0, 2 * high or 1.0)
        span = high - low
    rough = span / about
    magnitude = 10 ** floor(log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    first, last = floor(low / step + 1e-9), -floor(-high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _svg(size: Size, inner: Markup, hover: Sequence[object]) -> Markup:
    return Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" data-hover="{hover}">{inner}'
        '<line class="cursor" y1="{top}" y2="{bottom}" x1="-9" x2="-9"/></svg>'
    ).format(w=size.width, h=size.height, hover=json.dumps(hover), inner=inner, top=_TOP, bottom=size.height - _BOTTOM)


def _grid(frame: _Frame, ticks: Sequence[float], axis: Axis) -> Markup:
    line = Markup(
        '<line class="gridline" x1="{l}" x2="{r}" y1="{y}" y2="{y}"/>'
        '<text class="tick end" x="{t}" y="{ty}">{text}</text>'
    )
    right = frame.size.width - _RIGHT
    return Markup("").join(
        line.format(l=_LEFT, r=right, y=frame.y(tick), t=_LEFT - 7, ty=frame.y(tick) + 4, text=axis.tick(tick))
        for tick in ticks
    )


def _x_axis(frame: _Frame, xs: Sequence[int]) -> Markup:
    text = Markup('<text class="tick middle" x="{x}" y="{y}">{label}</text>')
    marks = [
        round(tick) for tick in nice_ticks(min(xs), max(xs), 8) if min(xs) <= tick <= max(xs) and tick == round(tick)
    ]
    y = frame.size.height - _BOTTOM + 17
    return Markup("").join(
        text.format(x=frame.x(mark), y=y, label=f"step {mark}" if index == 0 else mark)
        for index, mark in enumerate(marks or [xs[0]])
    )


def _runs(xs: Sequence[int], *columns: Values) -> list[list[tuple[int, ...]]]:
    """Stretches of points in which no column has a gap."""
    runs: list[list[tuple[int, ...]]] = [[]]
    for point in zip(xs, *columns, strict=True):
        if None in point:
            runs.append([])
        else:
            runs[-1].append(point)  # pyright: ignore[reportArgumentType]
    return [run for run in runs if run]


def _band(frame: _Frame, xs: Sequence[int], one: Series) -> Markup:
    parts = []
    for run in _runs(xs, one.low or (), one.high or ()):
        upper = [f"{frame.x(x)},{frame.y(high)}" for x, _, high in run]
        lower = [f"{frame.x(x)},{frame.y(low)}" for x, low, _ in reversed(run)]
        parts.append(Markup('<polygon class="s{} band" points="{}"/>').format(one.colour, " ".join(upper + lower)))
    return Markup("").join(parts)


def _line(frame: _Frame, xs: Sequence[int], one: Series) -> Markup:
    parts = []
    dots = len(xs) <= 40
    for run in _runs(xs, one.values):
        points = " ".join(f"{frame.x(x)},{frame.y(value)}" for x, value in run)
        parts.append(Markup('<polyline class="s{} line" points="{}"/>').format(one.colour, points))
        if dots or len(run) == 1:
            circle = Markup('<circle class="s{} dot" cx="{}" cy="{}" r="3"/>')
            parts += [circle.format(one.colour, frame.x(x), frame.y(value)) for x, value in run]
    return Markup("").join(parts)


def _bar(frame: _Frame, x: int, base: float, top: float, width: float, colour: int) -> Markup:
    y, height = frame.y(top), round(frame.y(base) - frame.y(top), 1)
    if height <= 0:
        return Markup("")
    bar = Markup('<rect class="s{} fill" x="{}" y="{}" width="{}" height="{}"/>')
    return bar.format(colour, round(frame.x(x) - width / 2, 1), y, round(width, 1), height)


def _rows(series: Sequence[Series], index: int, axis: Axis) -> list[list[object]]:
    rows: list[list[object]] = []
    for one in series:
        value = one.values[index]
        text = "-" if value is None else axis.show(value)
        if value is not None and one.low is not None and one.high is not None:
            low, high = one.low[index], one.high[index]
            if low is not None and high is not None:
                text += f" [{axis.show(low)}, {axis.show(high)}]"
        rows.append([one.name, text, one.colour])
    return rows
