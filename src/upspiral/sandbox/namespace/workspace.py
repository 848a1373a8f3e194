"""The folder of one sandbox on the host, and reading and writing in it without being led out of it.

What runs inside may lay symbolic links, pipes and device-like names anywhere in the workspace. So every path is walked
one component at a time from an open folder, never following a link, and only regular files are read or written.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_PREFIX = "upspiral-sandboxes"
_MIN_FREE_BYTES = 1 << 30
_REMOVE_TIMEOUT_S = 60
_MAX_DEPTH = 200
"""Listing opens each folder from the top, so its time grows with the square of the depth."""
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENXIO, errno.ENAMETOOLONG}


class Workspace:
    """One folder. `owner` is (uid, gid) for what is written into it, or None to leave it to this process."""

    def __init__(self, path: Path, owner: tuple[int, int] | None = None):
        self.path = path
        self._owner = owner
        path.mkdir()
        path.chmod(0o755)  # bubblewrap enters it before it takes on the owner's id; the folder above is private
        if owner:
            os.chown(path, *owner)

    def read(self, path: str, max_bytes: int) -> bytes:
        """The first `max_bytes` of a regular file. Raises FileNotFoundError when it is none, or unreadable."""
        try:
            components = _components(path)
            folder = self._open_folder(components[:-1], create=False)
            try:
                descriptor = os.open(components[-1], os.O_RDONLY | _FILE_FLAGS, dir_fd=folder)
            finally:
                os.close(folder)
        except ValueError as error:
            raise FileNotFoundError(errno.ENOENT, str(error), path) from error
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                raise FileNotFoundError(errno.ENOENT, "no such regular file in the workspace", path) from error
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(max_bytes)
        finally:
            os.close(descriptor)

    def write(self, path: str, content: bytes) -> None:
        """Makes or replaces a file and the folders above it.

        Raises ValueError for a path that leaves the workspace, OSError when something else is in its place.
        """
        components = _components(path)
        folder = self._open_folder(components[:-1], create=True)
        try:
            descriptor = os.open(components[-1], os.O_WRONLY | os.O_CREAT | _FILE_FLAGS, 0o644, dir_fd=folder)
        finally:
            os.close(folder)
        with os.fdopen(descriptor, "wb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FileExistsError(errno.EEXIST, "something that is not a regular file is there", path)
            os.ftruncate(descriptor, 0)
            file.write(content)
            if self._owner:
                os.fchown(descriptor, *self._owner)

    def list_files(self) -> Sequence[str]:
        """Relative paths of all regular files, sorted.

        Folders that cannot be entered, or that are nested deeper than any sane tree, are left out.
        """
        found: list[str] = []
        waiting: list[tuple[str, ...]] = [()]
        while waiting:
            components = waiting.pop()
            try:
                folder = self._open_folder(components, create=False)
            except OSError:
                continue
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False) and len(components) < _MAX_DEPTH:
                            waiting.append((*components, entry.name))
                        elif entry.is_file(follow_symlinks=False):
                            found.append("/".join((*components, entry.name)))
            finally:
                os.close(folder)
        return sorted(found)

    def _open_folder(self, components: Sequence[str], create: bool) -> int:
        current = os.open(self.path, _FOLDER_FLAGS)
        for component in components:
            try:
                following = self._enter(current, component, create)
            finally:
                os.close(current)
            current = following
        return current

    def _enter(self, folder: int, component: str, create: bool) -> int:
        try:
            return os.open(component, _FOLDER_FLAGS, dir_fd=folder)
        except FileNotFoundError:
            if not create:
                raise
        os.mkdir(component, 0o755, dir_fd=folder)
        descriptor = os.open(component, _FOLDER_FLAGS, dir_fd=folder)
        if self._owner:
            os.fchown(descriptor, *self._owner)
        return descriptor


def _components(path: str) -> tuple[str, ...]:
    components = tuple(part for part in path.split("/") if part not in ("", "."))
    if path.startswith("/") or ".." in components or "\0" in path or not components:
        raise ValueError(f"{path!r} is not a relative path inside the workspace")
    return components


def make_owner_folder(root: Path | None) -> Path:
    """A folder for all sandboxes of this process, labelled with it, so that a later process can tell that it died."""
    root = root or _memory_folder()
    path = root / f"{_PREFIX}-{_namespace_of_pids()}-{os.getpid()}-{_start_time(os.getpid())}-{secrets.token_hex(3)}"
    path.mkdir(mode=0o700, parents=True)
    return path


def sweep(root: Path | None) -> list[Path]:
    """Removes what killed owners of the same user left behind. Returns what it removed."""
    removed = []
    for path in (root or _memory_folder()).glob(f"{_PREFIX}-{_namespace_of_pids()}-*"):
        pid, start_time = path.name.split("-")[-3:-1]
        if path.stat(follow_symlinks=False).st_uid == os.getuid() and str(_start_time(int(pid))) != start_time:
            remove_tree(path)
            removed.append(path)
    return removed


def remove_tree(path: Path) -> None:
    """Removes a folder, however deep it is and whatever modes were set inside. Best effort: a sweep comes later."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except (OSError, RecursionError):
        for command in (["chmod", "-R", "u+rwX", "--"], ["rm", "-rf", "--"]):
            subprocess.run([*command, path], capture_output=True, check=False, timeout=_REMOVE_TIMEOUT_S)


def _memory_folder() -> Path:
    """Memory is faster than a disk: laying out and removing many small files is most of what happens here."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK | os.X_OK) and shutil.disk_usage(memory).free > _MIN_FREE_BYTES:
        return memory
    return Path(tempfile.gettempdir())


def _namespace_of_pids() -> int:
    """Containers may share /dev/shm but not process ids; a process id means something only within one of these."""
    return os.stat("/proc/self/ns/pid").st_ino


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of the process (field 22 of /proc/PID/stat); None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text.rpartition(")")[2].split()[19])
