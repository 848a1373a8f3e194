"""Copies upper layers, merged into one, with all that overlays and programs can tell from them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from upspiral.sandbox.namespace.keeper.merged import FOLDER_FLAGS, OPAQUE, Entry, close_all, path_below, walk

_CHUNK_BYTES = 1 << 30
_OWN_ATTRIBUTES = "user.overlay."
_ESCAPED_ATTRIBUTES = "user.overlay.overlay."
"""A sandbox's own attributes of that name, as the kernel keeps them."""


def copy_layers(sources: Sequence[int], target: int) -> None:
    """Copies what lies in open folders of layers, top first, into an empty open folder."""
    root = os.stat(".", dir_fd=sources[0])
    _copy_attributes(sources[0], ".", target, ".", root)
    links = _Links({})
    try:
        walk(sources, _Target(os.dup(target)), lambda into, entry: _copy(entry, into, links))
    finally:
        links.close()


@dataclass(frozen=True, slots=True)
class _Target:
    folder: int

    def close(self) -> None:
        os.close(self.folder)


@dataclass(frozen=True, slots=True)
class _Links:
    """Where the first copy of a file with several names is: (device, inode) -> (open folder, name)."""

    first: dict[tuple[int, int], tuple[int, str]]

    def made(self, entry: Entry, into: int) -> bool:
        """Makes another name of a file that was copied before; False when it was not."""
        if entry.status.st_nlink < 2 or entry.is_whiteout:
            return False
        key = (entry.status.st_dev, entry.status.st_ino)
        if key not in self.first:
            self.first[key] = (os.dup(into), entry.name)
            return False
        folder, name = self.first[key]
        os.link(name, entry.name, src_dir_fd=folder, dst_dir_fd=into, follow_symlinks=False)
        return True

    def close(self) -> None:
        close_all([folder for folder, _ in self.first.values()])


def _copy(entry: Entry, target: _Target, links: _Links) -> _Target | None:
    into, status, name = target.folder, entry.status, entry.name
    if entry.is_folder:
        return _Target(_make_folder(entry, into))
    if links.made(entry, into):
        return None
    if stat.S_ISREG(status.st_mode):
        _copy_content(entry, into)
    elif stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=entry.holder), name, dir_fd=into)
    else:  # pipes and whiteouts; sockets, which nobody listens on any more
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=into)
    if not entry.is_whiteout:
        _copy_attributes(entry.holder, name, into, name, status)
    return None


def _make_folder(entry: Entry, into: int) -> int:
    os.mkdir(entry.name, 0o700, dir_fd=into)
    _copy_attributes(entry.holder, entry.name, into, entry.name, entry.status)
    if entry.opaque:
        os.setxattr(path_below(into, entry.name), OPAQUE, b"y", follow_symlinks=False)
    return os.open(entry.name, FOLDER_FLAGS, dir_fd=into)


def _copy_content(entry: Entry, into: int) -> None:
    source = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=entry.holder)
    try:
        copy = os.open(entry.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=into)
        try:
            os.ftruncate(copy, entry.status.st_size)
            position = 0
            while (begin := _next_data(source, position)) is not None:
                position = os.lseek(source, begin, os.SEEK_HOLE)
                _copy_range(source, copy, begin, position)
        finally:
            os.close(copy)
    finally:
        os.close(source)


def _next_data(source: int, position: int) -> int | None:
    try:
        return os.lseek(source, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def _copy_range(source: int, copy: int, begin: int, end: int) -> None:
    os.lseek(copy, begin, os.SEEK_SET)
    while begin < end:
        copied = os.sendfile(copy, source, begin, min(end - begin, _CHUNK_BYTES))
        if copied == 0:
            return
        begin += copied


def _copy_attributes(holder: int, name: str, into: int, copy: str, status: os.stat_result) -> None:
    """Owner, mode, extended attributes, times: in this order, because a new owner takes the setuid bit away."""
    os.chown(copy, status.st_uid, status.st_gid, dir_fd=into, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return
    os.chmod(copy, stat.S_IMODE(status.st_mode), dir_fd=into)
    source, target = path_below(holder, name), path_below(into, copy)
    for attribute in os.listxattr(source, follow_symlinks=False):
        if not attribute.startswith(_OWN_ATTRIBUTES) or attribute.startswith(_ESCAPED_ATTRIBUTES):
            value = os.getxattr(source, attribute, follow_symlinks=False)
            with suppress(OSError):  # of a kind that only the kernel may set
                os.setxattr(target, attribute, value, follow_symlinks=False)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=into, follow_symlinks=False)
