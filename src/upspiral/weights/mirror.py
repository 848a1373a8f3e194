"""What was published on another machine, in shared memory of this one: the same files, checked where they are read."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from upspiral.errors import StoreError, UpspiralError
from upspiral.weights.growing_file import GrowingFile
from upspiral.weights.publication import Publication
from upspiral.weights.receiver import Bytes, locked_manifest
from upspiral.weights.shelf import Place, Shelf

PIECE_BYTES = 1 << 28


def files_of(folder: Path) -> Iterator[tuple[str, Iterator[Bytes]]]:
    """Name and content, in pieces, of every file of a publication; the publisher leaves them alone until the iterator
    ends. Raises Damaged when there is none (any more)."""
    with locked_manifest(folder):
        for path in sorted(folder.iterdir()):
            yield path.name, _pieces(path)


def _pieces(path: Path) -> Iterator[Bytes]:
    with path.open("rb") as file:
        if path.stat().st_size:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            yield from (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))


class Mirror:
    """Keeps as many publications as their publisher does, and its files become those of later ones as the publisher's
    do. Not to be called by two threads at once."""

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        """`keep`: as in PublisherSettings."""
        self._shelf, self._keep = Shelf(root), keep
        self._newest: Publication | None = None
        self._here: Publication | None = None
        """The newest one as it lies here."""

    def find(self, publication: Publication) -> Publication | None:
        """The same one here, if it was the last that came."""
        return self._here if publication == self._newest else None

    def add(self, publication: Publication, files: Mapping[str, Iterable[Bytes]]) -> Publication:
        """Lays down the files of a publication. What is a difference may need a base that never came here: its receiver
        says so. Raises StoreError when there is no room; then there is nothing of it."""
        try:
            place = self._shelf.begin(publication.version, publication.base, self._keep)
            try:
                _fill(place, files)
                folder = self._shelf.complete(place, self._keep)
            except BaseException:
                self._shelf.abandon(place)
                raise
        except UpspiralError:
            raise  # some of them are OSErrors, too
        except OSError as error:
            raise StoreError(f"version {publication.version} has no room beside its engines: {error}") from error
        self._newest, self._here = publication, replace(publication, folder=folder)
        return self._here


def _fill(place: Place, files: Mapping[str, Iterable[Bytes]]) -> None:
    weights = [name for name in files if name.endswith(".safetensors")]
    for number, name in enumerate(weights):
        if number == len(place.files):
            place.files.append(GrowingFile(place.folder / name))
        for piece in files[name]:
            place.files[number].write(place.files[number].reserve(len(piece)), piece)
        place.files[number].finish()
        place.files[number].move(place.folder / name)
    for file in place.files[len(weights) :]:
        file.path.unlink()
        file.close()
    del place.files[len(weights) :]
    for path in place.folder.iterdir():
        if path.name not in files:
            path.unlink()  # of the version before
    for name in files.keys() - weights:
        with (place.folder / name).open("wb") as file:
            for piece in files[name]:
                file.write(piece.data)
