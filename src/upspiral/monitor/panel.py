"""The live panel and the plain lines: a run's state in, text out. Prints nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich import box
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from upspiral.monitor.lines import ledger_from_line
from upspiral.types import Ledger

BARS = "▁▂▃▄▅▆▇█"
MISSING = "-"
_LABEL_WIDTH = 10
_RECENT_STEPS = 5


@dataclass
class RunState:
    """What has happened so far. Times are of `time.monotonic`."""

    name: str
    total_steps: int
    started_s: float
    budget_minutes: float | None = None
    phase: str = "starting"
    done: int = 0
    total: int | None = None
    ended: bool = False
    failed: bool = False
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    evaluations: list[Mapping[str, Any]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    last_step: int = 0

    def begin_phase(self, name: str, done: int, total: int | None) -> None:
        self.phase, self.done, self.total = name, done, total

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes in a metrics line."""
        if line["kind"] == "step":
            _append_in_place_of_later(self.steps, line)
            self.last_step = line["step"]
        elif line["kind"] == "eval":
            _append_in_place_of_later(self.evaluations, line)
        self.ledger = sum(map(ledger_from_line, [*self.steps, *self.evaluations]), Ledger())

    def end(self, failed: bool) -> None:
        self.ended, self.failed = True, failed

    def seconds_left(self, now_s: float) -> float | None:
        """Remaining steps at the median of the last few, plus the final evaluation; at most the budget. None before
        the first step has told its duration."""
        durations = [total for line in self.steps[-_RECENT_STEPS:] if (total := _step_seconds(line))]
        if not durations or self.ended:
            return None
        final = self.evaluations[-1].get("seconds") or 0.0 if self.evaluations else 0.0
        left = max(self.total_steps - self.last_step, 0) * median(durations) + final
        if self.budget_minutes is not None:
            left = min(left, max(self.budget_minutes * 60 - (now_s - self.started_s), 0.0))
        return left


def panel(state: RunState, width: int, now_s: float) -> Panel:
    """The live panel at a terminal `width` in columns."""
    inner = max(min(width, 120) - 4, 40)
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(width=_LABEL_WIDTH, style="dim", no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_row("now", _bar(_phase_text(state), state.done, state.total, inner))
    grid.add_row("run", _bar(f"step {state.last_step}/{state.total_steps}", state.last_step, state.total_steps, inner))
    room = inner - _LABEL_WIDTH - 2
    for label, value in _measures(state, room):
        grid.add_row(label, value)
    colour = "red" if state.failed else "green" if state.ended else "cyan"
    return Panel(
        grid,
        title=Text.assemble(("upspiral", "bold"), f" · {state.name}"),
        title_align="left",
        subtitle=Text(_clock(state, now_s)),
        subtitle_align="right",
        box=box.ROUNDED,
        border_style=colour,
        width=inner + 4,
    )


def sparkline(values: Sequence[float | None], width: int) -> str:
    """The last `width` values as bars between their smallest and largest; a gap for a missing one."""
    shown = values[-width:] if width > 0 else []
    numbers = [value for value in shown if value is not None]
    if not numbers:
        return ""
    low, span = min(numbers), max(numbers) - min(numbers)
    top = len(BARS) - 1
    return "".join(
        " " if value is None else BARS[round((value - low) / span * top) if span else top // 2] for value in shown
    )


def step_text(line: Mapping[str, Any], total_steps: int) -> str:
    """One plain line about a step."""
    ledger = ledger_from_line(line)
    parts = [
        f"step {line['step']}/{total_steps}",
        f"reward {number(line.get('reward_mean'))}",
        f"signal {_signal(line)}",
        f"loss {number(line.get('loss'), 4)}",
        f"mismatch {number(line.get('mismatch_mean_abs'), 4)}",
        f"{number(line.get('sampled_tokens_per_s'), 0)} tok/s",
        f"{number(_step_seconds(line), 1)} s",
        f"ledger {_ledger_state(ledger)}: {_ledger_sum(ledger)}",
    ]
    return " | ".join(parts)


def evaluation_text(line: Mapping[str, Any]) -> str:
    """One plain line about a held-out evaluation."""
    text = (
        f"held-out after step {line['step']}: {line['success']}/{line['tasks']} = {percent(line['rate'])} "
        f"[{100 * line['low']:.1f}, {100 * line['high']:.1f}]"
    )
    if line.get("mean_calls") is not None:
        text += f" | {line['mean_calls']:.1f} calls"
    return text if line.get("seconds") is None else f"{text} | {line['seconds']:.0f} s"


def percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """For example "48 s", "6 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _append_in_place_of_later(lines: list[Mapping[str, Any]], line: Mapping[str, Any]) -> None:
    # A resumed run repeats steps; what it measured the first time must not count twice.
    while lines and lines[-1]["step"] >= line["step"]:
        lines.pop()
    lines.append(line)


def _measures(state: RunState, room: int) -> list[tuple[str, Text]]:
    rows = [("held-out", _heldout(state, room))]
    if state.steps:
        last = state.steps[-1]
        rewards = [line.get("reward_mean") for line in state.steps]
        rows += [
            ("reward", _with_sparkline(number(rewards[-1]), rewards, room)),
            ("signal", Text(_signal(last))),
            ("speed", Text(_speed(last))),
        ]
    if state.ledger.sampled:
        rows.append(("ledger", _ledger(state.ledger)))
    return rows


def _heldout(state: RunState, room: int) -> Text:
    if not state.evaluations:
        return Text("not measured yet", style="dim")
    first, last = state.evaluations[0], state.evaluations[-1]
    shown = f"{percent(last['rate'])} [{100 * last['low']:.1f}, {100 * last['high']:.1f}]"
    if last is first:
        return Text.assemble((shown, "bold"), f"  at step {last['step']}")
    gain = 100 * (last["rate"] - first["rate"])
    colour = "green" if gain > 0 else "red" if gain < 0 else ""
    text = Text.assemble((shown, "bold"), f"  at step {last['step']}  ", (f"{gain:+.1f} points", colour))
    text.append(f"  {sparkline([line['rate'] for line in state.evaluations], room - len(text) - 2)}", "cyan")
    return text


def _with_sparkline(shown: str, values: Sequence[float | None], room: int) -> Text:
    return Text.assemble((shown, "bold"), "  ", (sparkline(values, room - len(shown) - 2), "cyan"))


def _signal(line: Mapping[str, Any]) -> str:
    with_signal, sampled = line.get("groups_with_signal", MISSING), line.get("groups_sampled", MISSING)
    trained, rollouts = line.get("effective_batch", MISSING), line.get("rollouts", MISSING)
    return f"{with_signal}/{sampled} groups, {trained} of {rollouts} rollouts trained"


def _speed(line: Mapping[str, Any]) -> str:
    text = (
        f"{number(line.get('sampled_tokens_per_s'), 0)} tok/s sampled, "
        f"{number(line.get('trained_tokens_per_s'), 0)} tok/s trained"
    )
    seconds = _step_seconds(line)
    return f"{text}, {seconds:.1f} s a step" if seconds else text


def _ledger(ledger: Ledger) -> Text:
    closed = ledger.difference == 0
    mark = ("✓ closed  ", "green") if closed else (f"✗ off by {ledger.difference:,}  ", "bold red")
    return Text.assemble(mark, _ledger_sum(ledger))


def _ledger_state(ledger: Ledger) -> str:
    return "closed" if ledger.difference == 0 else f"OFF BY {ledger.difference:,}"


def _ledger_sum(ledger: Ledger) -> str:
    masked, dropped = sum(ledger.masked.values()), sum(ledger.dropped.values())
    sign = "=" if ledger.difference == 0 else "≠"
    text = f"sampled {ledger.sampled:,} {sign} trained {ledger.trained:,} + masked {masked:,}"
    return f"{text} + dropped {dropped:,}" if dropped else text


def _phase_text(state: RunState) -> str:
    if state.ended:
        return "stopped by an error" if state.failed else "finished"
    return state.phase if state.total is None else f"{state.phase} {state.done}/{state.total}"


def _bar(text: str, done: int, total: int | None, inner: int) -> Table:
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(width=min(34, inner // 3 + 4), no_wrap=True)
    row.add_column(ratio=1)
    bar = ProgressBar(total=total, completed=done) if total else Text("")
    row.add_row(Text(text, style="bold", overflow="ellipsis"), bar)
    return row


def _clock(state: RunState, now_s: float) -> str:
    elapsed = duration(now_s - state.started_s)
    left = state.seconds_left(now_s)
    return f"{elapsed} elapsed" + ("" if left is None else f", about {duration(left)} left")


def _step_seconds(line: Mapping[str, Any]) -> float | None:
    return (line.get("seconds") or {}).get("total")
