"""Progress in a terminal and outside of one, on real rich consoles."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from upspiral.monitor.lines import ledger_line
from upspiral.monitor.panel import BARS, RunState, duration, panel, sparkline
from upspiral.monitor.progress import LiveProgress
from upspiral.types import Ledger

EVALUATION = {
    "step": 4, "version": 4, "tasks": 200, "success": 126, "rate": 0.63, "low": 0.561, "high": 0.694,
    "temperature": 0.0, "mean_calls": 1.94, "seconds": 14.2,
}  # fmt: skip


def step_line(step: int, reward: float = 0.5, untracked: int = 0) -> dict[str, object]:
    ledger = Ledger(sampled=81_224 + untracked, trained=60_112, masked={"no_signal": 19_000, "failed": 2_112})
    return {
        "step": step, "reward_mean": reward, "groups_sampled": 14, "groups_with_signal": 9, "rollouts": 112,
        "effective_batch": 72, "loss": -0.0123, "sampled_tokens_per_s": 812.3, "trained_tokens_per_s": 1903.7,
        "seconds": {"total": 30.0}, "ledger": ledger_line(ledger),
    }  # fmt: skip


def run(terminal: bool, quiet: bool = False, width: int = 80) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    with LiveProgress("demo", 12, quiet=quiet, console=console) as progress:
        progress.phase("collecting rollouts", 0, 64)
        progress.phase("collecting rollouts", 37, 64)
        progress.step(step_line(4))
        progress.evaluation(EVALUATION)
        progress.note("one agent [hung]")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def render(state: RunState, width: int = 80, now_s: float = 100.0) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(panel(state, width, now_s))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_outside_a_terminal_each_event_is_one_line() -> None:
    lines = run(terminal=False).splitlines()
    assert lines[0] == "collecting rollouts (64) ..."
    assert lines[1].startswith("step 4/12 | reward 0.50 | signal 9/14 groups, 72 of 112 rollouts trained")
    assert lines[1].endswith("ledger closed: sampled 81,224 = trained 60,112 + masked 21,112")
    assert lines[2] == "held-out after step 4: 126/200 = 63.0 % [56.1, 69.4] | 1.9 calls | 14 s"
    assert lines[3:] == ["one agent [hung]"]


def test_quiet_says_no_phases_even_in_a_terminal() -> None:
    text = run(terminal=True, quiet=True)
    assert "collecting" not in text and "╭" not in text
    assert len(text.splitlines()) == 3


def test_in_a_terminal_the_panel_shows_everything() -> None:
    text = run(terminal=True)
    for expected in ("step 4/12", "63.0 % [56.1, 69.4]", "812 tok/s", "✓ closed", "elapsed", "finished"):
        assert expected in text
    assert "one agent [hung]" in text


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_panel_fits_its_terminal(width: int) -> None:
    state = RunState("a-run-with-a-rather-long-name", 1000, started_s=0.0)
    state.begin_phase("training microbatch", 2, 5)
    for step in range(1, 400):
        state.add({"kind": "step", **step_line(step, reward=step / 400)})
    state.add({"kind": "eval", **EVALUATION, "step": 0, "rate": 0.30})
    state.add({"kind": "eval", **EVALUATION})
    lines = render(state, width).splitlines()
    assert max(map(len, lines)) <= max(width, 44)
    assert "training microbatch 2/5" in "".join(lines) or width == 40


def test_an_open_ledger_is_said() -> None:
    state = RunState("demo", 12, started_s=0.0)
    state.add({"kind": "step", **step_line(1, untracked=7)})
    assert "✗ off by 7" in render(state)


def test_time_left_follows_the_recent_steps_and_the_budget() -> None:
    state = RunState("demo", 12, started_s=0.0)
    assert state.seconds_left(10.0) is None
    state.add({"kind": "step", **step_line(2)})
    assert state.seconds_left(60.0) == 300.0
    state.budget_minutes = 5
    assert state.seconds_left(60.0) == 240.0
    assert "about 4 min 00 s left" in render(state, now_s=60.0)


def test_a_failed_run_says_so() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with pytest.raises(RuntimeError), LiveProgress("demo", 12, console=console):
        raise RuntimeError
    assert isinstance(console.file, io.StringIO)
    assert "stopped by an error" in console.file.getvalue()


def test_a_resumed_run_starts_from_its_history() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    history = [{"kind": "step", **step_line(step)} for step in (4, 5)] + [{"kind": "note", "step": 5, "text": "x"}]
    with LiveProgress("demo", 12, console=console, history=history) as progress:
        progress.step(step_line(5))
    assert isinstance(console.file, io.StringIO)
    assert "step 5/12" in console.file.getvalue()
    assert "sampled 162,448 =" in console.file.getvalue(), "the repeated step must not count twice"


@given(st.lists(st.none() | st.floats(-1e6, 1e6)), st.integers(0, 40))
def test_a_sparkline_keeps_order_and_gaps(values: list[float | None], width: int) -> None:
    bars = sparkline(values, width)
    shown = values[-width:] if width else []
    if not any(value is not None for value in shown):
        assert bars == ""
        return
    assert len(bars) == len(shown)
    pairs = [(value, BARS.index(bar)) for value, bar in zip(shown, bars, strict=True) if value is not None]
    levels = [level for _, level in sorted(pairs)]
    assert levels == sorted(levels)


@pytest.mark.parametrize(("seconds", "text"), [(47.6, "48 s"), (365, "6 min 05 s"), (7800, "2 h 10 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
