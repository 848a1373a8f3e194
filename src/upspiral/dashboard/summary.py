"""The numbers of the report, taken from the metrics without rounding; the template only shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from upspiral.dashboard.run_data import RunData
from upspiral.dashboard.selection import PairedCounts, matched, paired_counts
from upspiral.eval.statistics import difference_interval, paired_difference_interval, wilson_interval
from upspiral.monitor.lines import ledger_from_line
from upspiral.types import Ledger

_SPLIT_LABELS = {"train": "training", "eval": "evaluation", "demonstration": "demonstrations"}
TIME_PARTS = ("collect", "train", "publish", "record", "checkpoint")

_REASONS = {
    "root": "a conversation begins",
    "append": "goes on from what is stored",
    "sibling": "another answer to the same prompt",
    "retry": "asked again for want of an answer",
    "branch": "another continuation of the same history",
    "edited": "the history holds an answer that was never given",
    "tools": "other tools were offered",
    "template": "the chat template renders the past differently",
    "spawn": "a sub-agent begins",
    "compaction": "goes on from a summary",
    "auxiliary": "a side call, never trained",
}


@dataclass(frozen=True, slots=True)
class Rate:
    """Successes of trials with their 95 % Wilson interval."""

    successes: int
    trials: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        return self.successes / self.trials if self.trials else 0.0


@dataclass(frozen=True, slots=True)
class Headline:
    """Held-out success before and after. `difference` and its interval are fractions, not points."""

    before: Rate
    after: Rate
    before_step: int
    after_step: int
    low: float
    high: float
    paired: bool
    """Whether the interval uses that both evaluations tried the same tasks."""

    @property
    def difference(self) -> float:
        return self.after.rate - self.before.rate

    @property
    def intervals_apart(self) -> bool:
        return self.after.low > self.before.high or self.after.high < self.before.low


@dataclass(frozen=True, slots=True)
class Comparison:
    """One kind or difficulty of task before and after."""

    label: str
    before: Rate | None
    after: Rate | None


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One line of the ledger table."""

    label: str
    ledger: Ledger


def rate(successes: int, trials: int) -> Rate:
    return Rate(successes, trials, *wilson_interval(successes, trials))


def evaluation_rate(line: Mapping[str, Any]) -> Rate:
    """The counts and the interval that the evaluation itself recorded."""
    return Rate(line["success"], line["tasks"], line["low"], line["high"])


def headline(run: RunData) -> Headline | None:
    """None until two evaluations can be compared."""
    if len(run.evaluations) < 2:
        return None
    first, last = run.evaluations[0], run.evaluations[-1]
    before, after = evaluation_rate(first), evaluation_rate(last)
    counts = paired_counts(matched(run))
    paired = _agrees(counts, before, after)
    if paired:
        low, high = paired_difference_interval(counts.both, counts.before_only, counts.after_only, counts.neither)
    else:
        low, high = difference_interval((before.successes, before.trials), (after.successes, after.trials))
    return Headline(before, after, first["step"], last["step"], low, high, paired)


def comparisons(run: RunData, field: str) -> list[Comparison]:
    """Before and after by "by_kind" or "by_difficulty", in the order of the labels."""
    if not run.evaluations:
        return []
    first = run.evaluations[0].get(field) or {}
    last = (run.evaluations[-1].get(field) or {}) if len(run.evaluations) > 1 else {}
    return [Comparison(label, _tally(first.get(label)), _tally(last.get(label))) for label in sorted({*first, *last})]


def step_ledgers(run: RunData) -> list[LedgerRow]:
    """One row a step that recorded a ledger."""
    return [LedgerRow(str(line["step"]), ledger_from_line(line)) for line in run.steps if line.get("ledger")]


def run_ledgers(run: RunData) -> list[LedgerRow]:
    """The run's tokens from the stored trajectories, by split, and of the whole run in the last row."""
    if run.store is None:
        return []
    splits = dict.fromkeys(rollout.split for rollout in run.rollouts())
    rows = [LedgerRow(_SPLIT_LABELS.get(split, split), run.store.ledger(split=split)) for split in splits]
    return [*[row for row in rows if row.ledger.sampled], LedgerRow("whole run", run.store.ledger())]


def reasons(rows: Sequence[LedgerRow]) -> tuple[list[str], list[str]]:
    """Every reason for which tokens were masked, and for which they were dropped."""
    masked = {reason for row in rows for reason in row.ledger.masked}
    dropped = {reason for row in rows for reason in row.ledger.dropped}
    return sorted(masked), sorted(dropped)


def node_shares(run: RunData) -> list[tuple[str, str, int, float]]:
    """(reason, what it means, nodes, share) of all nodes of the run, the most frequent first."""
    counts = run.store.shape()[0] if run.store else {}
    total = sum(counts.values())
    return [(reason, _REASONS.get(reason, ""), count, count / total) for reason, count in counts.items()]


def edge_counts(run: RunData) -> dict[str, int]:
    """Causal edges of the run by kind."""
    return run.store.shape()[1] if run.store else {}


def time_split(run: RunData) -> dict[str, list[float]]:
    """Seconds of each part of every step; "other" is what the parts leave of the total."""
    seconds = [line.get("seconds") or {} for line in run.steps]
    parts = {name: [float(one.get(name) or 0.0) for one in seconds] for name in TIME_PARTS}
    known = [sum(parts[name][index] for name in TIME_PARTS) for index in range(len(seconds))]
    parts["other"] = [max((one.get("total") or 0.0) - known[index], 0.0) for index, one in enumerate(seconds)]
    return {name: values for name, values in parts.items() if any(values)}


def _tally(tally: Sequence[int] | None) -> Rate | None:
    return None if tally is None else rate(tally[1], tally[0])


def _agrees(counts: PairedCounts, before: Rate, after: Rate) -> bool:
    """Whether the stored rollouts are the ones that the metrics counted."""
    return (
        counts.total == before.trials == after.trials
        and counts.both + counts.before_only == before.successes
        and counts.both + counts.after_only == after.successes
    )
