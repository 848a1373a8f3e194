"""Which id of this machine a sandbox has."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_RANGES = (range(1_879_048_192, 2_147_483_647), range(20_000, 60_000))
"""Ids that no user of this machine has: a range that the allotment of systemd leaves free; for a container, whose ids
seldom reach that far, one that is free on most machines."""


@dataclass(frozen=True, slots=True)
class Identity:
    """As whom a sandbox runs. Those that descend from one another have the same, because they share files."""

    outside: int
    inside: int


class Identities:
    """Hands them out, none twice. Where it begins is chosen by chance, because other keepers on the machine have the
    same ids to hand out."""

    def __init__(self, free: Sequence[int]):
        """No free ids: there is but one, that of this process, which is 0 in the keeper's own namespace."""
        self._free = free
        self._numbers = itertools.count(int.from_bytes(os.urandom(8), "big") % len(free) if free else 0)

    @classmethod
    def of_this_process(cls) -> Identities:
        if os.geteuid() != 0:
            return cls(())
        for free in _RANGES:
            if _is_mapped(free):
                return cls(free)
        raise PermissionError("root of a user namespace without ids to hand out; start as an ordinary user instead")

    @property
    def many(self) -> bool:
        return len(self._free) > 0

    def new(self, inside: int) -> Identity:
        return Identity(self._free[next(self._numbers) % len(self._free)] if self.many else 0, inside)


def _is_mapped(ids: range) -> bool:
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = (int(each) for each in line.split())
        if first <= ids.start and ids.stop <= first + count:
            return True
    return False
