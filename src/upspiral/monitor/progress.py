"""What a person sees while a run runs: a live panel in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from upspiral.monitor.panel import RunState, evaluation_text, panel, step_text

REFRESH_PER_SECOND = 4


class Progress(Protocol):
    """Where the loop says what it is doing. Used as a context manager around the whole run."""

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """The work at hand and how far it is, for example ("collecting rollouts", 37, 64). Cheap: call it often."""
        ...

    def step(self, line: Mapping[str, Any]) -> None:
        """A "step" line of the metrics, after the step."""
        ...

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """An "eval" line of the metrics."""
        ...

    def note(self, text: str) -> None:
        """A remark for people."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class LiveProgress:
    """A panel that redraws itself in place; one plain line per step and evaluation when standard output is no
    terminal or `quiet` is set. Evaluations and notes stay above the panel as a history."""

    def __init__(
        self,
        name: str,
        steps: int,
        *,
        quiet: bool = False,
        budget_minutes: float | None = None,
        history: Iterable[Mapping[str, Any]] = (),
        console: Console | None = None,
    ) -> None:
        """`steps` of the whole run; `history`: metrics lines of a run that is resumed, shown but not announced."""
        self._console = console or Console(file=sys.stdout)
        self._state = RunState(name, steps, started_s=time.monotonic(), budget_minutes=budget_minutes)
        for line in history:
            self._state.add(line)
        self._quiet = quiet
        self._announced: set[str] = set()
        self._live: Live | None = None
        if self._console.is_terminal and not quiet:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=REFRESH_PER_SECOND,
                redirect_stdout=self._console.file is sys.stdout,
                redirect_stderr=self._console.file is sys.stdout,
            )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state.end(failed=error is not None)
        if self._live:
            self._live.stop()

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        self._state.begin_phase(name, done, total)
        if self._live is None and not self._quiet and name not in self._announced:
            # Said once each: a log that stays silent until the first step looks stuck.
            self._announced.add(name)
            self._print(f"{name} ..." if total is None else f"{name} ({total}) ...")

    def step(self, line: Mapping[str, Any]) -> None:
        self._state.add({**line, "kind": "step"})
        if self._live is None:
            self._print(step_text(line, self._state.total_steps))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        self._state.add({**line, "kind": "eval"})
        self._print(evaluation_text(line))

    def note(self, text: str) -> None:
        self._print(text)

    def _render(self) -> RenderableType:
        return panel(self._state, self._console.width, time.monotonic())

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)
