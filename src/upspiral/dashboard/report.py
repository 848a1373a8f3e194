"""report.html: a run as one self-contained page.

Nothing on it is loaded from anywhere, and its content security policy lets no script but its own run: what models and
tools wrote is shown as text, whatever it looks like.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from upspiral.dashboard import selection, summary
from upspiral.dashboard.chart import Axis, Series, Size, interval_track, line_chart, stacked_bars
from upspiral.dashboard.conversation import Conversation, TokenTexts, read_conversation
from upspiral.dashboard.run_data import RunData
from upspiral.dashboard.token_text import load_token_texts
from upspiral.errors import StoreError
from upspiral.monitor.panel import duration, number
from upspiral.types import Rollout

FILE_NAME = "report.html"
MAX_TEXT = 4000
"""Characters of one tool output or message that the page shows."""
_BEFORE, _AFTER = 5, 1
"""Colours of the page."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its words. `legend` is (colour, name) where there is more than one series."""

    title: str
    note: str
    chart: Markup
    legend: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True, slots=True)
class Exhibit:
    """Conversations side by side."""

    title: str
    instruction: str
    columns: Sequence[tuple[str, Conversation]]


def write_report(run_folder: Path) -> Path:
    """Writes RUN/report.html and returns its path. Works on a run that was killed: the page says what is missing.

    Raises StoreError when the folder is no run or the page cannot be written.
    """
    with RunData.open(run_folder) as run:
        page = render_report(run)
        path = run.folder / FILE_NAME
    # Never leave half a page where a whole one stood.
    partial = path.with_suffix(".html.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(f"{path} could not be written: {error.strerror}; free space and write it again") from error
    return path


def render_report(run: RunData) -> str:
    """The page as text."""
    token_texts = load_token_texts(run.model)
    script = _resource("report.js")
    environment, recorded = run.environment()
    run_ledgers, step_ledgers = summary.run_ledgers(run), summary.step_ledgers(run)
    headline, matched = summary.headline(run), selection.matched(run)
    return _template().render(
        run=run,
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        headline=headline,
        tracks=_headline_tracks(headline) if headline else {},
        latest=summary.evaluation_rate(run.evaluations[-1]) if run.evaluations else None,
        heldout=heldout_figure(run),
        figures=[figure for figure in training_figures(run) if figure.chart],
        comparisons=[
            (title, summary.comparisons(run, field))
            for title, field in (
                ("By kind of task", "by_kind"),
                ("By difficulty (tool calls an oracle needs)", "by_difficulty"),
            )
        ],
        run_ledgers=run_ledgers,
        step_ledgers=step_ledgers,
        ledger_reasons=summary.reasons([*run_ledgers, *step_ledgers]),
        node_shares=summary.node_shares(run),
        edge_counts=summary.edge_counts(run),
        has_tokens=token_texts is not None,
        pairs=_pair_exhibits(run, matched, token_texts),
        counts=selection.paired_counts(matched) if matched else None,
        group=_group_exhibit(run, token_texts),
        environment=environment,
        environment_recorded=recorded,
        max_text=MAX_TEXT,
    )


def heldout_figure(run: RunData) -> Figure | None:
    """Held-out success over steps with its 95 % band."""
    lines = run.evaluations
    if not lines:
        return None
    steps = [line["step"] for line in lines]
    series = Series(
        "success",
        [line["rate"] for line in lines],
        1,
        [line["low"] for line in lines],
        [line["high"] for line in lines],
    )
    chart = line_chart(steps, [series], Axis(percent=True, low=0.0, high=1.0), Size(1040, 280))
    temperature = lines[-1].get("temperature")
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}" if temperature is not None else "sampled"
    tasks = lines[-1]["tasks"]
    return Figure("Held-out success", f"{tasks} tasks never trained on, {how}; band: 95 % Wilson interval", chart)


def training_figures(run: RunData) -> list[Figure]:
    """The curves over training steps, in reading order."""
    return [
        _figure(run, "Training reward", "mean over the rollouts of a step", [("reward_mean", "reward")], Axis(low=0.0)),
        _figure(
            run, "Groups", "a group has signal when its rollouts differ in reward",
            [("groups_sampled", "sampled"), ("groups_with_signal", "with signal")], Axis(low=0.0, digits=0),
        ),
        _figure(
            run, "Effective batch", "rollouts that entered the loss, of those collected",
            [("rollouts", "collected"), ("effective_batch", "trained")], Axis(low=0.0, digits=0),
        ),
        _figure(run, "Entropy", "of the policy on trained tokens, in nats", [("entropy", "entropy")], Axis(low=0.0)),
        _figure(run, "Gradient norm", "before clipping", [("grad_norm", "norm")], Axis(low=0.0)),
        _figure(
            run, "Engine mismatch, mean", "|log p of the trainer - log q of the engine|",
            [("mismatch_mean_abs", "mean")], Axis(low=0.0, digits=5),
        ),
        _figure(run, "Engine mismatch, largest", "of any token", [("mismatch_max_abs", "largest")], Axis(low=0.0)),
        _figure(run, "Clipped tokens", "share of trained tokens", [("clip_fraction", "clipped")], Axis(True, low=0.0)),
        _figure(
            run, "Throughput", "tokens a second while collecting and while training",
            [("trained_tokens_per_s", "trained"), ("sampled_tokens_per_s", "sampled")], Axis(low=0.0, digits=0),
        ),
        _time_figure(run),
    ]  # fmt: skip


def _figure(run: RunData, title: str, note: str, fields: Sequence[tuple[str, str]], axis: Axis) -> Figure:
    series = [
        Series(name, [line.get(field) for line in run.steps], colour)
        for colour, (field, name) in enumerate(fields, start=1)
    ]
    chart = line_chart([line["step"] for line in run.steps], series, axis)
    return Figure(title, note, chart, [(one.colour, one.name) for one in series] if len(series) > 1 else [])


def _time_figure(run: RunData) -> Figure:
    parts = summary.time_split(run)
    series = [Series(name, values, colour) for colour, (name, values) in enumerate(parts.items(), start=1)]
    chart = stacked_bars([line["step"] for line in run.steps], series, Axis(digits=1))
    return Figure("Where the time goes", "seconds a step", chart, [(one.colour, one.name) for one in series])


def _pair_exhibits(
    run: RunData, matched: Sequence[tuple[Rollout, Rollout]], token_texts: TokenTexts | None
) -> list[Exhibit]:
    if run.store is None:
        return []
    exhibits: list[Exhibit] = []
    for pair in selection.telling_pairs(matched):
        columns = [
            (label, read_conversation(run.store, rollout, token_texts))
            for label, rollout in (
                (f"Before (step {pair.before.step})", pair.before),
                (f"After (step {pair.after.step})", pair.after),
            )
        ]
        exhibits.append(Exhibit(pair.title, _instruction(pair.before), columns))
    return exhibits


def _group_exhibit(run: RunData, token_texts: TokenTexts | None) -> tuple[selection.TrainingGroup, Exhibit] | None:
    group = selection.training_group(run)
    if group is None or run.store is None:
        return None
    columns = [
        (f"Rollout {rollout.id}", read_conversation(run.store, rollout, token_texts)) for rollout in group.rollouts
    ]
    return group, Exhibit(f"group {group.group_id}", _instruction(group.rollouts[0]), columns)


def _instruction(rollout: Rollout) -> str:
    return rollout.instruction or f"task {rollout.task_id}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "duration": duration, "percent": _percent, "points": _points}
    environment.filters |= {"fact": _fact, "level": _level}
    environment.globals |= {"comparison_track": _comparison_track}
    return environment.from_string(_resource("report.html.jinja"))


def _resource(name: str) -> str:
    return resources.files("upspiral.dashboard").joinpath(name).read_text("utf-8")


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _level(probability: float) -> int:
    """0 (the model was sure) to 9 (a surprise)."""
    return min(int((1 - probability) * 10), 9)


def _fact(value: Any) -> str:
    """A metrics field in words."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(part)}" for key, part in value.items())
    if isinstance(value, list):
        shown = [_fact(part) for part in value]
        return ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]])
    return str(value)


def _headline_tracks(headline: summary.Headline) -> dict[str, Markup]:
    before, after = headline.before, headline.after
    return {
        "before": interval_track([(before.rate, before.low, before.high, _BEFORE)], 420),
        "after": interval_track([(after.rate, after.low, after.high, _AFTER)], 420),
    }


def _comparison_track(comparison: summary.Comparison) -> Markup:
    rows = [
        (rate.rate, rate.low, rate.high, colour)
        for rate, colour in ((comparison.before, _BEFORE), (comparison.after, _AFTER))
        if rate is not None
    ]
    return interval_track(rows)
