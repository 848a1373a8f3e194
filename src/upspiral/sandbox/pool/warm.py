"""Sandboxes that wait ready, by kind."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Hashable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

from upspiral.sandbox.base import Sandbox, SandboxSpec
from upspiral.sandbox.pool.limits import PoolLimits
from upspiral.sandbox.pool.pace import Rate

_ARRIVAL_MEMORY_S = 30.0
_CREATE_WEIGHT = 0.2
"""How much the newest start counts in the mean of how long one takes."""


@dataclass(eq=False, slots=True)
class Kept:
    """A sandbox that the pool holds open. It is given to one owner, once."""

    sandbox: Sandbox
    context: AbstractAsyncContextManager[Sandbox]
    made_at: float
    owner: str | None = None
    end: asyncio.Task[None] | None = None
    """Stops it."""


def kind_of(spec: SandboxSpec) -> Hashable:
    """Equal for specs that the same warm sandbox fits: all but files, which are written when it is given away, and
    labels, where none of them is written down: what goes out of a sandbox is."""
    return (
        spec.image,
        tuple(sorted(spec.env.items())),
        spec.limits,
        spec.network,
        tuple(sorted(spec.forward_sockets.items())),
        tuple(sorted(spec.mounts.items())),
        tuple(sorted(_lasting_labels(spec).items())),
    )


def _lasting_labels(spec: SandboxSpec) -> Mapping[str, str]:
    return {} if spec.network == "none" else spec.labels


class Shelf:
    """The warm sandboxes of one kind, and how many of them there should be."""

    def __init__(self, spec: SandboxSpec, limits: PoolLimits) -> None:
        self.spec = replace(spec, files={}, labels=_lasting_labels(spec))
        # With a way out there is a kind for each set of labels, of which another one is rarely asked for.
        self.minimum, self.maximum = (limits.warm_min, limits.warm_max) if spec.network == "none" else (0, 0)
        self.is_wanted = True
        """False once the pool has forgotten this kind."""
        self.starting = 0
        self.not_before = 0.0
        """After a failure no warm one is made for a while."""
        # What is made late in a sandbox's life would end soon after it is given away.
        self._age_s = min(limits.warm_age_s, spec.limits.lifetime_s / 10)
        self._ready: deque[Kept] = deque()
        self._arrivals = Rate(_ARRIVAL_MEMORY_S)
        self._create_s: float | None = None

    def __len__(self) -> int:
        return len(self._ready)

    def asked(self, now: float) -> None:
        self._arrivals.add(now)

    @property
    def has_been_made(self) -> bool:
        """At least once, as long as the pool remembers this kind."""
        return self._create_s is not None

    def created(self, seconds: float) -> None:
        mean = seconds if self._create_s is None else self._create_s
        self._create_s = mean + _CREATE_WEIGHT * (seconds - mean)

    def put(self, kept: Kept) -> None:
        self._ready.append(kept)

    def take(self) -> Kept | None:
        """The oldest, so that none grows old behind others."""
        return self._ready.popleft() if self._ready else None

    def take_old(self, now: float) -> Kept | None:
        return self.take() if self._ready and self.old_at() <= now else None

    def old_at(self) -> float:
        """When the oldest is too old."""
        return self._ready[0].made_at + self._age_s if self._ready else math.inf

    def target(self, now: float) -> int:
        """As many as are asked for while one is made."""
        expected = self._arrivals.per_s(now) * (self._create_s or 0.0)
        # Decaying arrivals never reach zero; a hundredth of a sandbox is none.
        return max(self.minimum, min(self.maximum, math.ceil(expected - 0.01)))

    def lacks(self, now: float) -> bool:
        return now >= self.not_before and len(self._ready) + self.starting < self.target(now)
