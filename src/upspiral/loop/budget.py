"""A time budget: RL stops while there is time left for the last evaluation."""

from __future__ import annotations

import time


class Budget:
    """Predicts the next step by the slowest so far, and the last evaluation likewise."""

    def __init__(self, minutes: float | None) -> None:
        self._minutes = minutes
        self._started = time.monotonic()
        self._step_s = 0.0
        self._evaluation_s = 0.0

    def step_took(self, seconds: float) -> None:
        self._step_s = max(self._step_s, seconds)

    def evaluation_took(self, seconds: float) -> None:
        self._evaluation_s = max(self._evaluation_s, seconds)

    def allows_a_step(self) -> bool:
        if self._minutes is None:
            return True
        spent = time.monotonic() - self._started
        return spent + self._step_s + self._evaluation_s <= self._minutes * 60

    @property
    def reason(self) -> str:
        return f"stopped in time for the last evaluation: budget_minutes = {self._minutes:g}" if self._minutes else ""
