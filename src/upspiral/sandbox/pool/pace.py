"""How fast things come and may go: a token bucket, a decaying rate, and a breaker. All take the time as an argument."""

from __future__ import annotations

import math


class TokenBucket:
    """Allows `per_s` of something on average and `burst` of it at once."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = float(burst)
        self._filled_at = 0.0

    def take(self, now: float) -> bool:
        self._fill(now)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def wait_s(self, now: float) -> float:
        """Until there is one to take."""
        self._fill(now)
        return max(0.0, (1.0 - self._tokens) / self._per_s)

    def _fill(self, now: float) -> None:
        # A hair more than has flowed in: who waits exactly `wait_s` must not find 0.999... of a token.
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._per_s + 1e-9)
        self._filled_at = now


class Rate:
    """Events a second, with an exponential memory of `memory_s`."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._weight = 0.0
        self._at = -math.inf

    def add(self, now: float) -> None:
        self._weight = self._decayed(now) + 1.0
        self._at = now

    def per_s(self, now: float) -> float:
        return self._decayed(now) / self._memory_s

    def _decayed(self, now: float) -> float:
        return self._weight * math.exp((self._at - now) / self._memory_s)


class Breaker:
    """Keeps a backend that fails again and again from being asked for a while.

    Closed: every start is let through. Open, after `failures` in a row: none is, for `rest_s`. Then one is, on trial:
    it closes the breaker or opens it again.
    """

    def __init__(self, failures: int, rest_s: float) -> None:
        self._limit = failures
        self._rest_s = rest_s
        self._failures = 0
        self._open_until = -math.inf
        self._on_trial = False
        self.last_failure = ""

    def is_open(self, now: float) -> bool:
        """Whether whoever asks now has to go away. Not while a trial is due or under way."""
        return self._failures >= self._limit and not self._on_trial and now < self._open_until

    def wait_s(self, now: float) -> float:
        """Until a start may be tried, as far as time decides it: infinite while one is on trial."""
        if self._on_trial:
            return math.inf
        return max(0.0, self._open_until - now) if self._failures >= self._limit else 0.0

    def allows(self, now: float) -> bool:
        return self._failures < self._limit or (not self._on_trial and now >= self._open_until)

    def started(self) -> None:
        """A start that was allowed begins."""
        self._on_trial = self._failures >= self._limit

    def succeeded(self) -> None:
        self._failures, self._on_trial = 0, False

    def failed(self, now: float, reason: str) -> None:
        self._failures += 1
        self._on_trial = False
        self.last_failure = reason
        if self._failures >= self._limit:
            self._open_until = now + self._rest_s

    def abandoned(self) -> None:
        """A start ended without a word about the backend."""
        self._on_trial = False
