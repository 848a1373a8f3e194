"""Writes the weights of a version where engines can read them, whole or as a difference, while the engines go on.

It takes tensors one by one and keeps none of them, so that nobody holds a whole model beside the trainer. Only who
publishes differences has a copy of the version before on the CPU.
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from upspiral.errors import StoreError, UpspiralError
from upspiral.weights.difference import difference
from upspiral.weights.publication import Probe, Publication, PublisherSettings
from upspiral.weights.receiver import BITS, DTYPES, MANIFEST, PROBE, Bytes, Entry, Manifest, checksum
from upspiral.weights.safetensors_files import SafetensorsFiles
from upspiral.weights.shelf import Place, Shelf

CHANGES = "changes.bin"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CONFIGURATION = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")
_CONFIGURATION += ("vocab.*", "merges.txt", "chat_template.jinja")


@dataclass(slots=True, eq=False)
class _Base:
    """The version before."""

    manifest: Manifest
    entries: dict[str, Entry]
    whole_bytes: int
    """Of the last whole publication."""
    chain_bytes: int
    """Of the differences since then."""


class Publisher:
    """One trainer's. Not to be called by two threads at once."""

    def __init__(self, config_folder: Path) -> None:
        """`config_folder`: the Hugging Face folder that the model came from; its config and tokenizer go with whole
        publications, which are Hugging Face folders themselves."""
        self._config_folder = config_folder
        self._shelves: dict[Path, Shelf] = {}
        self._held: dict[str, Bytes] = {}
        self._base: _Base | None = None

    def refresh(self) -> None:
        """The next publication is whole."""
        self._base = None

    def publish(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        version: int,
        settings: PublisherSettings,
        *,
        probe: Probe | None = None,
    ) -> Publication:
        """Writes a version, which engines see when it is complete, in place of one with the same number. `tensors`: by
        Hugging Face's names (`weights/names.py`), on any device. What earlier publishers left in the root goes as what
        is older.

        Raises StoreError when it cannot be written; then there is nothing of it, and the next one is whole.
        """
        base, self._base = self._base, None
        if base is not None and (settings.form == "full" or base.chain_bytes > base.whole_bytes):
            base = None
        try:
            shelf = self._shelf(settings.root)
            place = shelf.begin(version, base and base.manifest.version, settings.keep)
            try:
                published, now = self._write(place, tensors, base, settings, probe)
                folder = shelf.complete(place, settings.keep)
            except BaseException:
                shelf.abandon(place)
                raise
        except UpspiralError:
            raise  # some of them are OSErrors, too
        except OSError as error:
            raise StoreError(
                f"version {version} could not be published in {settings.root}: {error}; free space there, or change "
                "weights.transport"
            ) from error
        self._base = now
        return replace(published, folder=folder)

    def _shelf(self, root: Path) -> Shelf:
        if root not in self._shelves:
            self._shelves[root] = Shelf(root)
        return self._shelves[root]

    def _write(
        self,
        place: Place,
        tensors: Iterable[tuple[str, Tensor]],
        base: _Base | None,
        settings: PublisherSettings,
        probe: Probe | None,
    ) -> tuple[Publication, _Base | None]:
        holds = settings.form == "delta" or bool(self._held)
        form = _Difference(place, self._held, base.entries) if base else _Whole(place, self._held if holds else None)
        entries = tuple(_entries(tensors, form))
        if base is None and not (place.folder / "config.json").exists():
            self._copy_configuration(place.folder, DTYPES[entries[0].dtype])
        files, num_bytes = form.finish()
        manifest = Manifest(
            version=place.version,
            tensors=entries,
            files=files,
            base=(base.manifest.version, base.manifest.content) if base else None,
            probe=_write_probe(place.folder, probe),
        )
        num_bytes += (place.folder / MANIFEST).write_bytes(manifest.to_bytes())
        now = _Base(
            manifest,
            {entry.name: entry for entry in entries},
            whole_bytes=base.whole_bytes if base else num_bytes,
            chain_bytes=base.chain_bytes + num_bytes if base else 0,
        )
        published = Publication(place.folder, place.version, base and base.manifest.version, num_bytes)
        return published, now if holds else None

    def _copy_configuration(self, folder: Path, dtype: torch.dtype) -> None:
        for pattern in _CONFIGURATION:
            for path in self._config_folder.glob(pattern):
                shutil.copyfile(path, folder / path.name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # the old name of the same key
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _Form(Protocol):
    """How the tensors of a publication are written."""

    def add(self, name: str, tensor: Tensor) -> Entry: ...

    def repeat(self, name: str, entry: Entry) -> Entry:
        """The tensor that was added last, with one more name."""
        ...

    def finish(self) -> tuple[tuple[tuple[str, int, str], ...], int]:
        """The manifest's files, and how many bytes they have."""
        ...


def _entries(tensors: Iterable[tuple[str, Tensor]], form: _Form) -> Iterator[Entry]:
    entry: Entry | None = None
    before: weakref.ref[Tensor] | None = None
    for name, tensor in tensors:
        again = before is not None and before() is tensor
        entry = form.repeat(name, entry) if again and entry else form.add(name, tensor)
        before = weakref.ref(tensor)
        del tensor  # the next one is gathered while this name would still hold it
        yield entry


class _Whole:
    def __init__(self, place: Place, held: dict[str, Bytes] | None) -> None:
        self._files = SafetensorsFiles(place.folder, place.files)
        self._place, self._held = place, held

    def add(self, name: str, tensor: Tensor) -> Entry:
        data = _bytes_of(tensor)
        entry = Entry(name, _NAMES[tensor.dtype], [*tensor.shape], "")
        file, offset, written = self._files.add(name, entry.dtype, entry.shape, data)
        if self._held is not None:
            _room(self._held, name, len(data))[:] = data
        return replace(entry, checksum=written, file=file, offset=offset)

    def repeat(self, name: str, entry: Entry) -> Entry:
        """The file has it once, as `save_pretrained` writes it; the manifest says where."""
        if self._held is not None:
            self._held[name] = self._held[entry.name]
        return replace(entry, name=name)

    def finish(self) -> tuple[tuple[tuple[str, int, str], ...], int]:
        return self._files.finish(), sum(file.length for file in self._place.files)


class _Difference:
    def __init__(self, place: Place, held: dict[str, Bytes], before: Mapping[str, Entry]) -> None:
        self._held, self._before = held, before
        self._path = place.folder / CHANGES
        self._file = self._path.open("wb")

    def add(self, name: str, tensor: Tensor) -> Entry:
        new, entry = _bytes_of(tensor), Entry(name, _NAMES[tensor.dtype], [*tensor.shape], "")
        before = self._before.get(name)
        if before is None or (before.dtype, before.shape) != (entry.dtype, entry.shape):
            changes = None
        else:
            bits = BITS[entry.item_bytes]
            changes = difference(self._held[name].view(bits), new.view(bits))
            if changes is not None and not len(changes):
                return replace(before, file=None, offset=0, changes=None)
        offset = self._append(new if changes is None else changes)
        count = None if changes is None else len(changes) // (entry.item_bytes + 1)
        whole = checksum(new, into=_room(self._held, name, len(new)))
        return replace(entry, checksum=whole, file=0, offset=offset, changes=count)

    def repeat(self, name: str, entry: Entry) -> Entry:
        self._held[name] = self._held[entry.name]
        return replace(entry, name=name)

    def finish(self) -> tuple[tuple[tuple[str, int, str], ...], int]:
        length = self._file.tell()
        self._file.close()
        return ((CHANGES, 0, checksum(np.empty(0, np.uint8))),) if length else (), length

    def _append(self, data: Bytes) -> int:
        """Where it begins in the file."""
        offset = self._file.tell()
        self._file.write(data.data)
        return offset


def _room(held: dict[str, Bytes], name: str, count: int) -> Bytes:
    """Where a tensor is kept, which is where it was."""
    if name not in held or len(held[name]) != count:
        held[name] = np.empty(count, np.uint8)
    return held[name]


def _bytes_of(tensor: Tensor) -> Bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _write_probe(folder: Path, probe: Probe | None) -> str | None:
    """Its checksum."""
    if probe is None:
        (folder / PROBE).unlink(missing_ok=True)
        return None
    data = json.dumps(asdict(probe)).encode()
    (folder / PROBE).write_bytes(data)
    return checksum(np.frombuffer(data, np.uint8))
