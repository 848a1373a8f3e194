"""Who stands on what: locks between the processes that use one store of images."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from upspiral.errors import DeadlineError

_DEADLINE_S = 60.0
_LOOK_AGAIN_S = 0.01


@contextlib.contextmanager
def locked(folder: Path, *, alone: bool) -> Iterator[None]:
    """The lock of a store: shared by all that add or hold, taken alone by the collector. Raises DeadlineError.

    The system frees it when a process ends, however that comes about.
    """
    with open(folder / "lock", "ab") as file:
        deadline_s = time.monotonic() + _DEADLINE_S
        while not _try_lock(file.fileno(), fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
            if time.monotonic() > deadline_s:
                raise DeadlineError(f"waited {_DEADLINE_S:.0f} s for the lock of the images in {folder}")
            time.sleep(_LOOK_AGAIN_S)
        yield


def make_lock(path: Path) -> int:
    """Makes a file and locks it for as long as its descriptor is open, at the longest for the life of this process.
    Under the store's lock."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def is_abandoned(lock: Path) -> bool:
    """Whether the process that locked this file for as long as it lives is gone. To be asked under the store's lock,
    taken alone: files are made and locked under it."""
    try:
        with open(lock, "rb") as file:
            return _try_lock(file.fileno(), fcntl.LOCK_EX)
    except (FileNotFoundError, NotADirectoryError):  # what has no lock was made under the store's
        return True


def _try_lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Hold:
    """Keeps images and layers from being collected, until it is released or the process ends. A process that was forked
    meanwhile holds them too, until it ends or closes its files."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._digests: set[str] = set()
        self._path = store / "holds" / f"{os.getpid()}-{secrets.token_hex(8)}"
        with locked(store, alone=False):
            self._descriptor: int | None = make_lock(self._path)

    def add(self, digests: Iterable[str]) -> None:
        """Holds more: they are safe from then on. To be called under the store's lock, so that what was seen there is
        held before anybody can collect it."""
        assert self._descriptor is not None, "the hold was released"
        new = sorted(set(digests) - self._digests)
        os.write(self._descriptor, "".join(f"{each}\n" for each in new).encode())
        self._digests.update(new)

    def release(self) -> None:
        """Safe to call twice."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def held_digests(store: Path) -> Iterator[set[str]]:
    """What each live hold has; the files of those whose process is gone are removed. Under the store's lock, taken
    alone."""
    for path in (store / "holds").iterdir():
        if is_abandoned(path):
            path.unlink(missing_ok=True)
        else:
            with contextlib.suppress(FileNotFoundError):  # released meanwhile
                yield set(path.read_text().split())
