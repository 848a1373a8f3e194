"""A folder in shared memory that goes with the process that made it, however that ends."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from upspiral.errors import StoreError
from upspiral.weights.receiver import SHARED_MEMORY

PREFIX = "upspiral-weights-"
# The end of its input is that of the process. It stands apart from its parent and group, which may be killed as one.
_WATCH = 'exec 3<&0; { read -r _ <&3; rm -rf -- "$1"; } &'
_START_DEADLINE_S = 60.0


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder until the block ends or, by a watch of its own, this process. What is forgotten in shared memory is
    memory that nobody has. Raises StoreError."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=SHARED_MEMORY))
    except OSError as error:
        raise StoreError(
            f'there can be no folder in {SHARED_MEMORY} ({error}); set weights.transport = "disk"'
        ) from error
    try:
        with _watched(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watched(folder: Path) -> IO[bytes]:
    """Who watches ends, and removes the folder, when this is closed."""
    try:
        watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "watch", folder], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        if watch.wait(_START_DEADLINE_S):
            raise OSError(f"/bin/sh ended with {watch.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StoreError(f'nobody could be set to remove {folder} ({error}); set weights.transport = "disk"') from error
    assert watch.stdin is not None
    return watch.stdin
