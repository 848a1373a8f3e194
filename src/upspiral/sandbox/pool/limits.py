"""What a pool may take of its backend, and how long anybody waits for it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from upspiral.errors import ConfigError

_MAY_BE_ZERO = ("warm_min", "warm_max", "retry_delay_s")


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Times in seconds. Raises ConfigError for one with which nobody would get anything."""

    live: int = 1000
    """Sandboxes at the same time: warm, starting, in use and being stopped, together."""
    starting: int = 32
    """Sandboxes that are being made at the same time."""
    starts_per_s: float = 1000.0
    """How many may begin in a second, on average."""
    start_burst: int = 100
    """How many may begin at once after a rest."""
    queued: int = 1000
    """Who comes when so many wait already is told to come back (SandboxBusyError)."""
    wait_s: float = 60.0
    """How long `acquire` takes at most, queueing and retries included."""
    start_timeout_s: float = 60.0
    """For one attempt at making one."""
    stop_timeout_s: float = 30.0
    attempts: int = 3
    """How often one is made for the same request when the infrastructure fails."""
    retry_delay_s: float = 0.1
    """Before the second attempt; doubled before each further one, and varied, so that retries do not march in step."""
    breaker_failures: int = 8
    """After so many failed starts in a row none is tried for `breaker_rest_s`; then one is."""
    breaker_rest_s: float = 5.0
    warm_min: int = 0
    """Of each kind of sandbox that is asked for, so many wait ready at least ..."""
    warm_max: int = 32
    """... and at most; between them as many as arrive while one is made."""
    warm_age_s: float = 300.0
    """A warm sandbox that nobody took for so long is stopped: its lifetime runs from when it was made."""
    warm_kinds: int = 64
    """Kinds of sandboxes that are remembered; the one that was not asked for longest is forgotten."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not (value > 0 or (value == 0 and each.name in _MAY_BE_ZERO)):
                raise ConfigError(f"a pool with {each.name} = {value} gives nothing out; it must be above 0")
