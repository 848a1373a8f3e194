"""How many sandboxes a pool has, and whose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from upspiral.errors import SandboxBusyError
from upspiral.sandbox.pool.metrics import PoolMetrics


class Fork(Protocol):
    async def stop(self) -> None: ...


class Books:
    """They close at any moment: made = stopped + live - starting, and live <= limit."""

    def __init__(self, limit: int, metrics: PoolMetrics, freed: Callable[[], None]) -> None:
        self.limit = limit
        self.live = 0
        """From the beginning of a start to the end of a stop."""
        self.reserved = 0
        """Room for forks that are being made."""
        self.starting = 0
        self.made = 0
        self.stopped = 0
        self.in_use: Counter[str] = Counter()
        """By owner: what it has, and what is being started for it."""
        self.forks: set[Fork] = set()
        """Those that live. Nobody but their owners holds them."""
        self._metrics = metrics
        self._freed = freed
        """Called when there is room again."""

    @property
    def has_room(self) -> bool:
        return self.live + self.reserved < self.limit

    def start_begins(self) -> None:
        self.live += 1
        self.starting += 1

    def start_ends(self, *, made: bool) -> None:
        self.starting -= 1
        if made:
            self.made += 1
            self._metrics.made.inc()
        else:
            self.live -= 1

    def has_stopped(self) -> None:
        self.live -= 1
        self.stopped += 1
        self._metrics.stopped.inc()
        self._freed()

    def reserve(self, count: int) -> None:
        """Room for forks, before they are made. Raises SandboxBusyError when there is none."""
        if self.live + self.reserved + count > self.limit:
            self._metrics.refused("fork")
            raise SandboxBusyError(
                f"{count} forks do not fit: {self.live} of {self.limit} sandboxes are live; stop some, or fork fewer",
                retry_after_s=1.0,
            )
        self.reserved += count

    def forked(self, count: int, reserved: int, owner: str) -> None:
        """So many of the reserved ones were made."""
        self.reserved -= reserved
        if count:
            self.live += count
            self.made += count
            self._metrics.made.inc(count)
            self.in_use[owner] += count
        if count < reserved:
            self._freed()

    def returned(self, owner: str) -> None:
        self.in_use[owner] -= 1
        if not self.in_use[owner]:
            del self.in_use[owner]
