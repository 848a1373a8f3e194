"""The folder in which publications lie: which of them stay, and what becomes of the others."""

from __future__ import annotations

import fcntl
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from upspiral.weights.growing_file import GrowingFile
from upspiral.weights.receiver import MANIFEST, Manifest, folder_name, is_shared_memory

_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a publication is written."""

    folder: Path
    version: int
    base: int | None
    files: list[GrowingFile] = field(default_factory=list)
    """Of an earlier version, to be filled again; then those of this one."""


def _found(folder: Path) -> Place:
    try:
        base = Manifest.from_bytes((folder / MANIFEST).read_bytes()).base
    except (OSError, ValueError, KeyError, TypeError):
        base = None  # nobody can read it
    return Place(folder, int(folder.name[1:]), base[0] if base else None)


class Shelf:
    """One publisher's. A version is written in a folder `v000007.partial`, which gets its name when it is complete: all
    that lies there without the ending is whole at any moment.

    In shared memory, the files of a version that goes become those of the next whole one; not while someone reads
    them.
    """

    def __init__(self, root: Path) -> None:
        """Takes over what earlier publishers left there. Raises OSError."""
        root.mkdir(parents=True, exist_ok=True)
        for folder in root.glob(f"v*{_PARTIAL}"):
            shutil.rmtree(folder)
        self._root = root
        self._again = is_shared_memory(root)
        self._places = [_found(folder) for folder in sorted(root.glob("v*"))]
        """The complete ones, oldest first."""

    def begin(self, version: int, base: int | None, keep: int) -> Place:
        """A place to fill. Makes room for it: one less than `keep` stay, and at least one."""
        place = Place(self._root / (folder_name(version) + _PARTIAL), version, base)
        gone = self._surplus(max(1, keep - 1))
        spare = next((each for each in gone if base is None and each.files), None)
        for each in gone:
            if each is not spare:
                self._remove(each)
        if spare is None or not self._take(spare, place):
            if spare is not None:
                self._remove(spare)
            place.folder.mkdir()
        return place

    def complete(self, place: Place, keep: int) -> Path:
        """Gives the folder its name, which another of the same version loses."""
        folder = self._root / folder_name(place.version)
        same = [each for each in self._places if each.version == place.version]
        for each in same:
            self._remove(each)
        place.folder.rename(folder)
        for file in place.files:
            file.path = folder / file.path.name
        self._places = [each for each in self._places if each not in same]
        self._places.append(Place(folder, place.version, place.base, place.files))
        for each in self._surplus(keep):
            self._remove(each)
        return folder

    def abandon(self, place: Place) -> None:
        """Leaves nothing of what was not completed."""
        self._remove(place)

    def _surplus(self, keep: int) -> list[Place]:
        """Takes off all but the newest and those that they are differences to. Newest first: so, at any moment, no
        difference is there without what it needs."""
        by_version = {each.version: each for each in self._places}
        needed: set[int] = set()
        for newest in self._places[-keep:]:
            each: Place | None = newest
            while each is not None and each.version not in needed:
                needed.add(each.version)
                each = None if each.base is None else by_version.get(each.base)
        gone = [each for each in reversed(self._places) if each.version not in needed]
        self._places = [each for each in self._places if each.version in needed]
        return gone

    def _take(self, old: Place, new: Place) -> bool:
        """Makes the folder of an old version that of a new one; False when it has to be left alone."""
        if not (self._again and (old.folder / MANIFEST).exists()):
            return False
        with (old.folder / MANIFEST).open("rb") as manifest:
            try:
                fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            old.folder.rename(new.folder)
            (new.folder / MANIFEST).unlink()
        for file in old.files:
            file.path = new.folder / file.path.name
            file.rewind()
        new.files.extend(old.files)
        return True

    def _remove(self, place: Place) -> None:
        """Whoever reads it has it open, and may go on."""
        for file in place.files:
            file.close()
        gone = place.folder.with_name(f"{place.folder.name}.gone{_PARTIAL}")  # from here on it may be half
        if place.folder.exists():  # or somebody else has cleared up
            place.folder.rename(gone)
            shutil.rmtree(gone)
