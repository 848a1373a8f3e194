"""A file that is filled from its beginning through memory, and can be filled again."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_STEP_BYTES = 1 << 24


class GrowingFile:
    """Its pages stay mapped. Where they are there already, filling it goes at the speed of memory: a page that is
    touched for the first time costs more than to copy it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        """Of what was filled."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._size = 0
        self._bytes = np.empty(0, np.uint8)

    def room(self, count: int) -> NDArray[np.uint8]:
        """The next bytes of the file, to be filled. Raises OSError when there is no space for them."""
        start, self.length = self.length, self.length + count
        if self.length > self._size:
            self._grow(-(-self.length // _STEP_BYTES) * _STEP_BYTES)
        return self._bytes[start : self.length]

    def rewind(self) -> None:
        """The next room is the beginning."""
        self.length = 0

    def finish(self) -> None:
        """Cuts off what was not filled, and hands the rest to the disk if it lies on one."""
        if self.length:
            self._map.flush()
        os.truncate(self._file, self.length)
        self._size = self.length

    def move(self, path: Path) -> None:
        """The file has, or from now on has, another name."""
        if path != self.path and self.path.exists():
            self.path.rename(path)
        self.path = path

    def close(self) -> None:
        os.close(self._file)

    def _grow(self, size: int) -> None:
        # Pages that were not to be had would kill the process when they are touched; here it is an error.
        os.posix_fallocate(self._file, 0, size)
        self._map = mmap.mmap(self._file, size)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._size = size
