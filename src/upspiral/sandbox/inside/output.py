"""What commands write: the reading ends of their pipes."""

from __future__ import annotations

import os
from collections.abc import Callable

from .loop import READABLE, Loop

_buffer = bytearray(256 << 10)
"""For everybody: there is one thread, and what is read is copied out at once."""
_ROUNDS = 64
"""So often a pipe is read at one time before others get their turn."""


class Outlet:
    """A pipe from a command. `take` gets what comes, at most `room()` bytes of it at a time; then `ended` is called.

    Once `drop` was called everything is read and forgotten, until the last writer is gone: whoever still writes in the
    background must neither wait nor get a SIGPIPE.
    """

    def __init__(
        self, loop: Loop, take: Callable[[memoryview], None], room: Callable[[], int], ended: Callable[[], None]
    ):
        self._loop = loop
        self._take = take
        self._room = room
        self._ended = ended
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        self.is_open = True

    def begin(self) -> None:
        """The command has its end; ours of that is closed."""
        os.close(self.writer)
        self.writer = -1
        self._loop.watch(self._reader, READABLE, self.pull)

    def pull(self, _events: int = 0) -> None:
        """Reads what there is."""
        for _ in range(_ROUNDS):
            if not self.is_open:
                return
            room = min(self._room(), len(_buffer))
            if room <= 0:
                return self._loop.forget(self._reader)
            try:
                size = os.readv(self._reader, [memoryview(_buffer)[:room]])
            except BlockingIOError:
                break
            if size == 0:
                self._close()
                return self._ended()
            self._take(memoryview(_buffer)[:size])
            if size < room:
                break  # it was all
        if self.is_open:  # whoever took it may have pulled as well, to the end
            self._loop.watch(self._reader, READABLE, self.pull)

    def drop(self) -> None:
        self._take, self._room, self._ended = (lambda content: None), (lambda: len(_buffer)), (lambda: None)
        if self.writer >= 0:
            self._close()
        elif self.is_open:
            self._loop.watch(self._reader, READABLE, self.pull)

    def _close(self) -> None:
        self.is_open = False
        self._loop.forget(self._reader)
        os.close(self._reader)
        if self.writer >= 0:
            os.close(self.writer)
