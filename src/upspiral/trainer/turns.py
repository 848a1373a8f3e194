"""Turns: lanes that compute side by side do certain things one after the other, in the order of their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Condition

from upspiral.errors import DeadlineError

_DEADLINE_S = 3600.0
"""How long a lane waits for its turn; the others may have a whole pass of a large model before them."""


class Turns:
    """At each place, a lane's turn comes when every lane before it has had its own there, or has ended."""

    def __init__(self, lanes: Iterable[int]) -> None:
        """`lanes`: the numbers of those that take turns; nobody waits for others."""
        self._changed = Condition()
        self._passed = {lane: set[int]() for lane in lanes}
        """Of each lane that has not ended, the places where it had its turn."""

    @contextmanager
    def at(self, lane: int, place: int) -> Iterator[None]:
        """Waits for the lane's turn at a place, and has it during the block. Raises DeadlineError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_come(lane, place), _DEADLINE_S):
                raise DeadlineError(
                    f"lane {lane} of the trainer waited {_DEADLINE_S:.0f} s for the lanes before it at gradient {place}"
                )
        yield
        with self._changed:
            self._passed[lane].add(place)
            self._changed.notify_all()

    @contextmanager
    def taken_by(self, lane: int) -> Iterator[None]:
        """What a lane does, all its turns included. Afterwards, or after an error, nobody waits for it."""
        try:
            yield
        finally:
            with self._changed:
                self._passed.pop(lane, None)
                self._changed.notify_all()

    def _has_come(self, lane: int, place: int) -> bool:
        return all(place in passed for other, passed in self._passed.items() if other < lane)
