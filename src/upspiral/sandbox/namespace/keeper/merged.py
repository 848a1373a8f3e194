"""Reading the upper layers of overlays as one: what is new in them, what replaces, and what they take away.

Every path is walked from open folders and never through a link, because what lies in a layer was made by a sandbox. The
layers must not change meanwhile. An upper layer says by a character device 0:0 that a name is gone ("whiteout"), and by
an attribute of a folder that nothing below shows through ("opaque").
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

OPAQUE = "user.overlay.opaque"
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a merged folder."""

    name: str
    status: os.stat_result
    holder: int
    """The open folder of the topmost layer that has this name."""
    below: Sequence[int]
    """Of a folder: the open folders that have it as part of what shows, top first, `holder` included."""
    opaque: bool
    """Of a folder: nothing below all these layers shows through."""

    @property
    def is_whiteout(self) -> bool:
        return stat.S_ISCHR(self.status.st_mode) and self.status.st_rdev == 0

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    def open_folders(self) -> list[int]:
        """The caller closes them."""
        opened: list[int] = []
        try:
            for folder in self.below:
                opened.append(os.open(self.name, FOLDER_FLAGS, dir_fd=folder))
        except BaseException:
            close_all(opened)
            raise
        return opened


def entries(folders: Sequence[int]) -> Iterator[Entry]:
    """What the same folder of several layers, top first, shows together, whiteouts included, sorted."""
    holders: dict[str, list[int]] = {}
    for folder in folders:
        for name in os.listdir(folder):
            holders.setdefault(name, []).append(folder)
    for name in sorted(holders):
        yield _entry(name, holders[name])


def _entry(name: str, holders: Sequence[int]) -> Entry:
    first = os.stat(name, dir_fd=holders[0], follow_symlinks=False)
    below: list[int] = []
    opaque = False
    if stat.S_ISDIR(first.st_mode):
        for holder in holders:
            mode = os.stat(name, dir_fd=holder, follow_symlinks=False).st_mode
            if not stat.S_ISDIR(mode):
                opaque = True
                break
            below.append(holder)
            if is_opaque(holder, name):
                opaque = True
                break
    return Entry(name, first, holders[0], below, opaque)


def is_opaque(holder: int, name: str) -> bool:
    try:
        return os.getxattr(path_below(holder, name), OPAQUE, follow_symlinks=False) in (b"y", b"x")
    except OSError:
        return False


class Place(Protocol):
    """What a walk keeps beside a merged folder for as long as it is in it."""

    def close(self) -> None: ...


P = TypeVar("P", bound=Place)


def walk(folders: Sequence[int], place: P, visit: Callable[[P, Entry], P | None]) -> None:
    """Visits every entry of merged folders, those below included. `visit` opens the place for what is below a folder,
    or returns None to leave that out. As many descriptors are open as there are layers and folders on one path.

    Closes `place`, and leaves `folders` open.
    """
    opened = [os.dup(each) for each in folders]
    frames = [(opened, place, entries(opened))]
    try:
        while frames:
            current, place, waiting = frames[-1]
            if (entry := next(waiting, None)) is None:
                frames.pop()
                close_all(current)
                place.close()
            elif (below := visit(place, entry)) is not None:
                opened = entry.open_folders()
                frames.append((opened, below, entries(opened)))
    finally:
        for current, place, _ in frames:
            close_all(current)
            place.close()


def path_below(folder: int, name: str) -> str:
    """For calls that cannot be told an open folder. Only the last part is not followed if it is a link."""
    return f"/proc/self/fd/{folder}/{name}"


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
