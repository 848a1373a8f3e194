"""A file that is filled from its beginning, piece by piece, and can be filled again."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from upspiral.weights.receiver import Bytes, checksum, is_shared_memory

_STEP_BYTES = 1 << 24
_WRITE_BYTES = 1 << 26


class GrowingFile:
    """In shared memory it stays mapped: where its pages are there already, filling it goes at the speed of memory. A
    page that is touched for the first time costs more than to copy it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        """Of what was reserved."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._mapped = is_shared_memory(path)
        self._size = 0
        self._bytes = np.empty(0, np.uint8)
        """The file, if it is mapped."""

    def reserve(self, count: int) -> int:
        """Where the next bytes of the file begin, which are to be written. Raises OSError when there is no space."""
        start, self.length = self.length, self.length + count
        if self._mapped and self.length > self._size:
            self._grow(-(-self.length // _STEP_BYTES) * _STEP_BYTES)
        return start

    def write(self, offset: int, data: Bytes) -> None:
        """Fills what was reserved. Raises OSError when there is no space."""
        if self._mapped:
            self._bytes[offset : offset + len(data)] = data
            return
        while len(data):
            written = os.pwrite(self._file, data[:_WRITE_BYTES].data, offset)
            data, offset = data[written:], offset + written

    def write_checked(self, offset: int, data: Bytes) -> str:
        """`write`; the checksum of the data."""
        if self._mapped:
            return checksum(data, into=self._bytes[offset : offset + len(data)])
        self.write(offset, data)
        return checksum(data)

    def rewind(self) -> None:
        """The next place is the beginning."""
        self.length = 0

    def finish(self) -> None:
        """Cuts off what was not reserved, and hands the rest to the disk if it lies on one."""
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

    def _grow(self, size: int) -> None:
        # Pages that were not to be had would kill the process when they are touched; here it is an error.
        os.posix_fallocate(self._file, 0, size)
        self._bytes = np.frombuffer(mmap.mmap(self._file, size), np.uint8)
        self._size = size
