"""Where the seconds of a step went."""

from __future__ import annotations

import time


class Clock:
    """Laps of one step, in seconds."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def split(self, name: str, *, of: str, seconds: float) -> None:
        """Makes a lap of its own of what another one has in it."""
        self._laps[of] -= seconds
        self._laps[name] = self._laps.get(name, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """Each lap, and "total"."""
        return {
            **{name: round(lap, 3) for name, lap in self._laps.items()},
            "total": round(self._last - self._started, 3),
        }
