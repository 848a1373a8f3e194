"""Reads published weights where an engine is, and knows when a byte of them is wrong.

Stands alone: torch, numpy and the standard library, no other module of upspiral. It is copied into the environments of
engines that have their own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MANIFEST, PROBE = "manifest.json", "probe.json"
SHARED_MEMORY = Path("/dev/shm")
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors has for them."""
BITS: Mapping[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Elements of so many bytes as what they are compared and replaced as."""

_ROW_WORDS = 521
_ROW_BYTES = 8 * _ROW_WORDS
_CHUNK_BYTES = 512 * _ROW_BYTES
"""What is summed is still in a core's cache when it is copied."""

Bytes = NDArray[np.uint8]


class Damaged(Exception):
    """A publication is not there, incomplete, or not what was written."""


class StaleBase(Exception):
    """A publication is a difference to weights that are neither held here nor beside it."""


def folder_name(version: int) -> str:
    return f"v{version:06d}"


def checksum(data: Bytes, into: Bytes | None = None) -> str:
    """Of any bytes, nearly at the speed of reading memory; copies them to `into` on the way.

    A digest of the sums of the columns of the data as tables of 64-bit words, 521 in a row and 512 rows each. Whatever
    is changed within 4168 bytes, such as a page that is lost or old, is noticed for certain: each word there has a
    column to itself. As 521 is a prime, pages and other blocks that changed places come into other columns. Anything
    else has to keep all sums by chance, or by intent: it is not made against that.
    """
    digest = hashlib.blake2b(len(data).to_bytes(8, "little"), digest_size=16)
    for start in range(0, len(data), _CHUNK_BYTES):
        chunk = data[start : start + _CHUNK_BYTES]
        whole = len(chunk) // _ROW_BYTES * _ROW_BYTES
        columns = chunk[:whole].view(np.uint64).reshape(-1, _ROW_WORDS).sum(0)
        if whole < len(chunk):
            last = np.zeros(_ROW_BYTES, np.uint8)
            last[: len(chunk) - whole] = chunk[whole:]
            columns += last.view(np.uint64)
        if into is not None:
            into[start : start + len(chunk)] = chunk
        digest.update(columns.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a publication."""

    name: str
    dtype: str
    shape: Sequence[int]
    checksum: str
    """Of the whole tensor's bytes, also where only a difference is written."""
    file: int | None = None
    """Which of the manifest's files has it; None: it is that of the base."""
    offset: int = 0
    changes: int | None = None
    """Of a difference, how many elements: their new values, then for each the number of elements, at most 255, that lie
    between it and the one before. None: the file has the whole tensor."""

    @property
    def item_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a publication's folder holds."""

    version: int
    tensors: tuple[Entry, ...]
    files: tuple[tuple[str, int, str], ...]
    """Name, length of the head before the tensors, and checksum of that head."""
    base: tuple[int, str] | None
    """Version and content of what this is a difference to."""
    probe: str | None
    """Checksum of probe.json, if there is one."""

    @property
    def content(self) -> str:
        """The same for the same weights, whole or as a difference."""
        lines = [f"{each.name} {each.dtype} {[*each.shape]} {each.checksum}" for each in self.tensors]
        return _digest("\n".join(lines).encode())

    def to_bytes(self) -> bytes:
        """The only bytes that a manifest of this content has."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        fields["tensors"] = [{name: getattr(each, name) for name in each.__slots__} for each in self.tensors]
        body = json.dumps(fields, separators=(",", ":")).encode()
        return body[:-1] + f',"seal":"{_digest(body)}"}}'.encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises ValueError, KeyError or TypeError when a byte is wrong."""
        fields = json.loads(data)
        del fields["seal"]
        fields["tensors"] = tuple(Entry(**each) for each in fields["tensors"])
        fields["files"] = tuple((*each,) for each in fields["files"])
        fields["base"] = fields["base"] and (*fields["base"],)
        manifest = cls(**fields)
        if manifest.to_bytes() != data:
            raise ValueError("its seal does not fit")
        return manifest


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_probe(folder: Path) -> dict[str, list[Any]] | None:
    """`token_ids`, and `logprobs` of all of them but the first, that an engine with these weights gives; None when the
    publication has no probe. Raises Damaged."""
    with locked_manifest(folder) as manifest:
        if manifest.probe is None:
            return None
        try:
            data = (folder / PROBE).read_bytes()
        except OSError as error:
            raise Damaged(f"{folder / PROBE} cannot be read: {error}") from None
        if checksum(np.frombuffer(data, np.uint8)) != manifest.probe:
            raise Damaged(f"{folder / PROBE} is not what was written")
        return json.loads(data)


class Receiver:
    """Remembers the weights that the last difference led to, on the CPU, so that the next one can be added to them."""

    def __init__(self) -> None:
        self._held: dict[str, Bytes] = {}
        self._content: str | None = None
        """Of `_held`; None: it is only room."""
        self._maps = _Maps()

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every tensor of a version, whole publication or difference, each checked.

        A tensor may be read, and not written, until the iterator ends: copy it. Raises StaleBase when this is a
        difference to weights that are neither held nor beside it, Damaged when it is not there, not complete or not
        what was written; what was yielded before is then of no use either.
        """
        with self.reading(folder) as tensors:
            yield from tensors

    @contextmanager
    def reading(self, folder: Path) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """`tensors`, which can be read until the block ends."""
        with ExitStack() as stack:
            chain = self._chain(folder, stack)
            self._content = None
            if chain[0].manifest.base is None and len(chain) == 1:
                yield self._whole(chain[0])
            else:
                yield self._patched(chain)
            self._maps.forget(keep=2 * len(chain[-1].manifest.files))

    def _chain(self, folder: Path, stack: ExitStack) -> list[_Opened]:
        """What is to be read, the version itself last: all differences since what is held, or since a whole one."""
        chain = [_Opened(folder, stack, self._maps)]
        while (base := chain[0].manifest.base) is not None and base[1] != self._content:
            version, content = base
            beside = folder.parent / folder_name(version)
            try:
                chain.insert(0, _Opened(beside, stack, self._maps))
            except Damaged as error:
                raise StaleBase(f"{folder} is a difference to version {version}, which is not here: {error}") from None
            if chain[0].manifest.content != content:
                raise StaleBase(f"{folder} is a difference to another version {version} than {beside}")
        return chain

    def _whole(self, opened: _Opened) -> Iterator[tuple[str, Tensor]]:
        """Views of the files."""
        for entry, again in _with_repeated(opened.manifest.tensors):
            data = opened.data(entry, entry.num_bytes)
            if not again:
                opened.check(entry, data)
            yield entry.name, _tensor(entry, data)

    def _patched(self, chain: list[_Opened]) -> Iterator[tuple[str, Tensor]]:
        newest, data = chain[-1], None
        for entry, again in _with_repeated(newest.manifest.tensors):
            if not again:
                data = self._held.get(entry.name)
                for opened in chain:
                    data = opened.applied(entry.name, data)
                newest.check(entry, data)
            assert data is not None
            self._held[entry.name] = data
            yield entry.name, _tensor(entry, data)
        self._content = newest.manifest.content


def _with_repeated(entries: Sequence[Entry]) -> Iterator[tuple[Entry, bool]]:
    """Each with whether it names the bytes of the one before once more, as a tied output layer does."""
    before = None
    for entry in entries:
        yield entry, before is not None and entry.file is not None and replace(entry, name=before.name) == before
        before = entry


def _tensor(entry: Entry, data: Bytes) -> Tensor:
    return torch.from_numpy(data.view(BITS[entry.item_bytes])).view(DTYPES[entry.dtype]).reshape(tuple(entry.shape))


class _Opened:
    """A publication that its publisher leaves alone until `stack` closes."""

    def __init__(self, folder: Path, stack: ExitStack, maps: _Maps) -> None:
        self.folder, self.manifest = folder, stack.enter_context(locked_manifest(folder))
        self._entries = {entry.name: entry for entry in self.manifest.tensors}
        self._files = [maps.of(folder / name) for name, _, _ in self.manifest.files]
        for data, (name, length, head) in zip(self._files, self.manifest.files, strict=True):
            if checksum(data[:length]) != head:
                raise Damaged(f"{folder / name} is not what was written, at its beginning")

    def data(self, entry: Entry, count: int, skip: int = 0) -> Bytes:
        """Bytes of a tensor's place in its file."""
        assert entry.file is not None
        start = entry.offset + skip
        data = self._files[entry.file][start : start + count]
        if len(data) != count:
            raise Damaged(f"{self.folder}: the file of {entry.name} is too short")
        return data

    def check(self, entry: Entry, data: Bytes | None) -> None:
        """Raises Damaged unless these are the tensor's bytes."""
        if data is None or len(data) != entry.num_bytes or checksum(data) != entry.checksum:
            raise Damaged(f"{self.folder}: {entry.name} is not what was written")

    def applied(self, name: str, data: Bytes | None) -> Bytes | None:
        """What a tensor is after this publication; `data`, what it was before, is overwritten."""
        entry = self._entries.get(name)
        if entry is None or entry.file is None:
            return data
        if entry.changes is not None:
            return self._changed(entry, data)
        whole = self.data(entry, entry.num_bytes)
        if data is None or len(data) != len(whole):
            return whole.copy()
        data[:] = whole
        return data

    def _changed(self, entry: Entry, data: Bytes | None) -> Bytes:
        assert entry.changes is not None
        bits = BITS[entry.item_bytes]
        values = self.data(entry, entry.changes * entry.item_bytes).view(bits)
        between = self.data(entry, entry.changes, skip=values.nbytes)
        positions = np.cumsum(between, dtype=np.int64) + np.arange(entry.changes)
        if data is None or len(data) != entry.num_bytes or positions[-1] >= len(data) // entry.item_bytes:
            raise Damaged(f"{self.folder}: the difference of {entry.name} does not fit its base")
        data.view(bits)[positions] = values
        return data


class _Maps:
    """Files as arrays. Those in shared memory stay mapped: a publisher writes into the same files again, and to map
    their pages anew takes longer than to copy them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], Bytes] = {}

    def of(self, path: Path) -> Bytes:
        """Raises Damaged when there is no such file, or nothing in it."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if not is_shared_memory(path):
                    return _mapped(file)
                key = status.st_dev, status.st_ino
                found = self._kept.pop(key, None)
                if found is None or len(found) != status.st_size:
                    found = _mapped(file)
                self._kept[key] = found
                return found
        except (OSError, ValueError) as error:
            raise Damaged(f"{path} cannot be read: {error}") from None

    def forget(self, keep: int) -> None:
        """Lets go of all but those used last."""
        for key in list(self._kept)[:-keep]:
            del self._kept[key]


def is_shared_memory(path: Path) -> bool:
    """Whether a file lies in the memory that all processes of this machine share."""
    return SHARED_MEMORY.is_dir() and path.stat().st_dev == SHARED_MEMORY.stat().st_dev


def _mapped(file: BinaryIO) -> Bytes:
    # Torch would warn of memory that cannot be written. Nobody writes into this, and it would stay private.
    return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


@contextmanager
def locked_manifest(folder: Path) -> Iterator[Manifest]:
    """Inside it, the publisher does not use the folder's files for another version. Raises Damaged."""
    path = folder / MANIFEST
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            _lock(file)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError("it is being replaced")
            manifest = Manifest.from_bytes(file.read())
        except OSError as error:
            raise Damaged(f"there is no publication {folder} (any more): {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{path} is not what was written: {error}") from None
        yield manifest


def _lock(file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError("it is being replaced") from None
    except OSError:
        pass  # a file system without locks; only in shared memory a file is used again
