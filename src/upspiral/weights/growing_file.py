"""A file that is filled from its beginning, piece by piece, and can be filled again."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upspiral.weights.receiver import is_shared_memory

_STEP_BYTES = 1 << 24
_WRITE_BYTES = 1 << 26


class GrowingFile:
    """In shared memory it stays mapped: where its pages are there already, filling it goes at the speed of memory. A
    page that is touched for the first time costs more than to copy it. Elsewhere, a piece is written when the next one
    begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        """Of what was filled."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._mapped = is_shared_memory(path)
        self._size = 0
        self._bytes = np.empty(0, np.uint8)
        """The mapped file, or room for a piece of it."""
        self._waiting = self._bytes
        """The piece that is to be written."""

    def room(self, count: int) -> NDArray[np.uint8]:
        """The next bytes of the file, to be filled before the next call. Raises OSError when there is no space."""
        self._write()
        start, self.length = self.length, self.length + count
        if self._mapped:
            if self.length > self._size:
                self._grow(-(-self.length // _STEP_BYTES) * _STEP_BYTES)
            return self._bytes[start : self.length]
        if count > len(self._bytes):
            self._bytes = np.empty(count, np.uint8)
        self._waiting = self._bytes[:count]
        return self._waiting

    def replace_beginning(self, data: bytes) -> None:
        """Of what was filled."""
        self._write()
        if self._mapped:
            self._bytes[: len(data)] = np.frombuffer(data, np.uint8)
        else:
            os.pwrite(self._file, data, 0)

    def rewind(self) -> None:
        """The next room is the beginning."""
        self.length = 0

    def finish(self) -> None:
        """Cuts off what was not filled, and hands the rest to the disk if it lies on one."""
        self._write()
        os.truncate(self._file, self.length)
        self._size = self.length
        if not self._mapped:
            os.fsync(self._file)

    def move(self, path: Path) -> None:
        """The file has, or from now on has, another name."""
        if path != self.path and self.path.exists():
            self.path.rename(path)
        self.path = path

    def close(self) -> None:
        os.close(self._file)

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, self._waiting[:0]
        offset = self.length - len(waiting)
        while len(waiting):
            written = os.pwrite(self._file, waiting[:_WRITE_BYTES].data, offset)
            waiting, offset = waiting[written:], offset + written

    def _grow(self, size: int) -> None:
        # Pages that were not to be had would kill the process when they are touched; here it is an error.
        os.posix_fallocate(self._file, 0, size)
        self._bytes = np.frombuffer(mmap.mmap(self._file, size), np.uint8)
        self._size = size
