"""What upper layers add to an image and take away from it, as a tar and a list of paths."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

from upspiral.sandbox.namespace.keeper.merged import FOLDER_FLAGS, Entry, close_all, entries, walk

_REGULAR = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Difference:
    """Written as it is found. `owner` is the id that everything belongs to inside."""

    def __init__(self, output: BinaryIO, owner: int, made: Collection[str]):
        self.removed: list[str] = []
        self._tar = tarfile.TarFile(fileobj=output, mode="w", format=tarfile.PAX_FORMAT)
        self._owner = owner
        self._made = {path for each in made for path in (each, *map(str, PurePosixPath(each).parents))}
        """What the sandbox found there, and the folders above."""
        self._first_names: dict[tuple[int, int], str] = {}

    def compare(self, uppers: Sequence[int], image: int) -> None:
        """`uppers`: open folders of layers, top first. `image`: the open root of what they lie on."""
        walk(uppers, _Original(os.dup(image), ""), self._compare)
        self._tar.close()

    def _compare(self, original: _Original, entry: Entry) -> _Original | None:
        path = f"{original.path}/{entry.name}"
        before = original.status(entry.name)
        was_folder = before is not None and stat.S_ISDIR(before.st_mode)
        if before is not None and (entry.is_whiteout or was_folder != entry.is_folder):
            self.removed.append(path)
        made = path in self._made
        if not entry.is_folder:
            if not (entry.is_whiteout or made):
                self._add(entry, path)
            return None
        if (before is None or not was_folder or _mode(before) != _mode(entry.status)) and not made:
            self._add(entry, path)
        if not was_folder:
            return _Original(-1, path)
        if entry.opaque:
            self._remove_hidden(entry, original, path)
        return _Original(os.open(entry.name, FOLDER_FLAGS, dir_fd=original.folder), path)

    def _remove_hidden(self, entry: Entry, original: _Original, path: str) -> None:
        """What the image has in a folder that was made anew, and that did not come back."""
        opened = entry.open_folders()
        try:
            present = {each.name for each in entries(opened)}
        finally:
            close_all(opened)
        hidden = os.open(entry.name, FOLDER_FLAGS, dir_fd=original.folder)
        try:
            self.removed += (f"{path}/{name}" for name in sorted(os.listdir(hidden)) if name not in present)
        finally:
            os.close(hidden)

    def _add(self, entry: Entry, path: str) -> None:
        status = entry.status
        member = tarfile.TarInfo(path.lstrip("/"))
        member.mode, member.mtime = stat.S_IMODE(status.st_mode), status.st_mtime
        member.uid = member.gid = self._owner
        if stat.S_ISDIR(status.st_mode):
            member.type = tarfile.DIRTYPE
        elif stat.S_ISLNK(status.st_mode):
            member.type = tarfile.SYMTYPE
            member.linkname = os.readlink(entry.name, dir_fd=entry.holder)
        elif stat.S_ISFIFO(status.st_mode):
            member.type = tarfile.FIFOTYPE
        elif not stat.S_ISREG(status.st_mode):
            return
        elif (first := self._first_names.setdefault((status.st_dev, status.st_ino), member.name)) != member.name:
            member.type, member.linkname = tarfile.LNKTYPE, first
        else:
            member.size = status.st_size
            with os.fdopen(os.open(entry.name, _REGULAR, dir_fd=entry.holder), "rb") as content:
                self._tar.addfile(member, content)
            return
        self._tar.addfile(member)


@dataclass(frozen=True, slots=True)
class _Original:
    """A folder of the image; -1 where it has none."""

    folder: int
    path: str

    def status(self, name: str) -> os.stat_result | None:
        if self.folder < 0:
            return None
        try:
            return os.stat(name, dir_fd=self.folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def close(self) -> None:
        if self.folder >= 0:
            os.close(self.folder)


def _mode(status: os.stat_result) -> int:
    return stat.S_IMODE(status.st_mode)
