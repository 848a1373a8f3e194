"""Who waits for a sandbox, and who is next: scoring before everything else, then whoever has the fewest."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.pool.warm import Kept

TENANT_LABEL = "tenant"
RUN_LABEL = "run"
"""Sandboxes are shared fairly between the values of the first of these that a spec's labels have."""
PURPOSE_LABEL = "purpose"
SCORING = "scoring"
"""A sandbox for scoring ends a rollout, and with it frees others: it goes first, but not before another tenant's."""


@dataclass(eq=False, slots=True)
class Request:
    """Somebody waits for a sandbox."""

    spec: SandboxSpec
    kind: Hashable
    answer: asyncio.Future[Kept]
    failures: int = 0
    not_before: float = 0.0
    """After a failure it rests for a while."""
    owner: str = field(init=False)
    is_urgent: bool = field(init=False)
    is_tenant: bool = field(init=False)
    """Its owner is: the others need not trust it."""

    def __post_init__(self) -> None:
        self.owner = owner_of(self.spec)
        self.is_urgent = self.spec.labels.get(PURPOSE_LABEL) == SCORING
        self.is_tenant = bool(self.spec.labels.get(TENANT_LABEL))


def owner_of(spec: SandboxSpec) -> str:
    return spec.labels.get(TENANT_LABEL) or spec.labels.get(RUN_LABEL, "")


class FairQueue:
    """Requests that wait for a start. Each owner's are in order; between owners, whoever uses the fewest sandboxes is
    next, so that a run of a thousand rollouts does not keep a run of ten waiting."""

    def __init__(self) -> None:
        self._lines: dict[tuple[bool, str], deque[Request]] = {}
        """By (not urgent, owner); none is empty. Owners stand in the order in which they came to wait."""

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[Request]:
        for line in list(self._lines.values()):
            yield from list(line)

    def add(self, request: Request, *, first: bool = False) -> None:
        """`first`: it waited before, and its start failed."""
        line = self._lines.setdefault((not request.is_urgent, request.owner), deque())
        if first:
            line.appendleft(request)
        else:
            line.append(request)

    def discard(self, request: Request) -> None:
        key = (not request.is_urgent, request.owner)
        line = self._lines.get(key)
        if line is None or request not in line:
            return
        line.remove(request)
        if line:
            # Whoever was served stands behind others that have as many.
            self._lines[key] = self._lines.pop(key)
        else:
            del self._lines[key]

    def next(self, now: float, in_use: Mapping[str, int], kind: Hashable | None = None) -> Request | None:
        """Whose turn it is, of those that do not rest. With `kind`, of those that ask for it, rested or not: a sandbox
        that is there need not be started."""
        best: tuple[tuple[bool, int, bool], Request] | None = None
        for (later, owner), line in self._lines.items():
            # What a tenant says of its requests concerns nobody else.
            rank = (later and not line[0].is_tenant, in_use.get(owner, 0), later)
            if best is not None and best[0] <= rank:
                continue
            for request in line:
                if request.kind == kind if kind is not None else request.not_before <= now:
                    best = (rank, request)
                    break
        return best[1] if best else None

    def first_rested_at(self) -> float | None:
        """When the first of them has rested; None when nobody waits."""
        return min((request.not_before for request in self), default=None)
