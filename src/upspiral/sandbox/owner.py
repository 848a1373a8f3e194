"""Whose a folder or a control group is: a label in its name, by which a later process can tell that its owner died."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upspiral.errors import SandboxError

_PREFIX = "upspiral"
_MEMORY = Path("/dev/shm")
_MIN_FREE_BYTES = 1 << 30
_REMOVE_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, for as long as the machine runs. Two processes are never the same."""

    boot: str
    pid_namespace: int
    """Containers may share folders and control groups, but not process ids."""
    pid: int
    start_time: int

    @classmethod
    def this_process(cls) -> Owner:
        return cls.of_process(os.getpid())

    @classmethod
    def of_process(cls, pid: int) -> Owner:
        """Of one that lives, in this pid namespace. Raises ProcessLookupError when there is none."""
        start_time = _start_time(pid)
        if start_time is None:
            raise ProcessLookupError(f"there is no process {pid}")
        return cls(_boot(), _namespace_of_pids(), pid, start_time)

    def label(self, kind: str) -> str:
        """A new one each time. `kind`: of backend, so that each sweeps as its own have to be swept."""
        parts = (kind, self.boot, self.pid_namespace, self.pid, self.start_time, secrets.token_hex(3))
        return "-".join((_PREFIX, *map(str, parts)))

    @classmethod
    def of(cls, name: str, kind: str) -> Owner | None:
        """None when the name is no label of that kind."""
        label = re.fullmatch(rf"{_PREFIX}-{kind}-([0-9a-f]+)-(\d+)-(\d+)-(\d+)-[0-9a-f]+", name)
        return cls(label[1], int(label[2]), int(label[3]), int(label[4])) if label else None

    @property
    def is_dead(self) -> bool:
        """Of what cannot be told from here, a process in another pid namespace, False."""
        if self.boot != _boot():
            return True
        return self.pid_namespace == _namespace_of_pids() and _start_time(self.pid) != self.start_time


def make_folder(root: Path | None, label: str) -> Path:
    """Below `root`; without: in memory, where making and removing many small files takes the least time. Raises
    SandboxError where there can be none."""
    folder = (root or default_root()) / label
    try:
        folder.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise SandboxError(f"no folder for sandboxes can be made: {error}") from error
    return folder


def default_root() -> Path:
    if os.access(_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_MEMORY).free > _MIN_FREE_BYTES:
        return _MEMORY
    return Path(tempfile.gettempdir())


def left_over_folders(root: Path | None, kind: str) -> Sequence[Path]:
    """Of owners of the same user that have died. Without `root`: wherever the default may have been for them, since
    memory that they filled is no default any more."""
    folders = [root] if root else [_MEMORY, Path(tempfile.gettempdir())]
    return [each for folder in folders if folder.is_dir() for each in folder.iterdir() if is_left_over(each, kind)]


def is_left_over(path: Path, kind: str) -> bool:
    """By its name and user."""
    owner = Owner.of(path.name, kind)
    try:
        return owner is not None and owner.is_dead and path.stat(follow_symlinks=False).st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def remove_tree(path: Path) -> None:
    """Removes a folder, however deep it is and whatever modes were set inside. Best effort: a sweep comes later."""
    try:
        shutil.rmtree(path)
    except (OSError, RecursionError):
        if not os.path.lexists(path):
            return
        # Also when something in it vanished meanwhile, because it is still in use or somebody else removes it, too.
        for command in (["chmod", "-R", "u+rwX", "--"], ["rm", "-rf", "--"]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([*command, path], capture_output=True, check=False, timeout=_REMOVE_TIMEOUT_S)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def _namespace_of_pids() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process (field 22 of /proc/PID/stat); None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text.rpartition(")")[2].split()[19])
