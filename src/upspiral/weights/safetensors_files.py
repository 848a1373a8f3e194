"""The safetensors format (github.com/huggingface/safetensors), written while tensors come in.

A file begins with a table of what is in it. As nobody knows the table before the last tensor has come, each file keeps
a fixed room for it and is full when that is; more files are then named by an index, as `save_pretrained` does it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from upspiral.weights.growing_file import GrowingFile
from upspiral.weights.receiver import Bytes

HEAD_BYTES = 1 << 16
"""For some 500 tensors."""
_INDEX = "model.safetensors.index.json"
_LEADING = b'{"__metadata__":{"format":"pt"}'


@dataclass(slots=True, eq=False)
class _Part:
    file: GrowingFile
    table: bytearray = field(default_factory=lambda: bytearray(_LEADING))
    names: list[str] = field(default_factory=list)

    def add(self, name: str, described: bytes) -> None:
        self.table += described
        self.names.append(name)

    def write_head(self) -> str:
        """Its checksum."""
        table = bytes(self.table) + b"}"
        head = (HEAD_BYTES - 8).to_bytes(8, "little") + table.ljust(HEAD_BYTES - 8)
        return self.file.write_checked(0, np.frombuffer(head, np.uint8))


class SafetensorsFiles:
    """The weight files of a Hugging Face folder."""

    def __init__(self, folder: Path, files: list[GrowingFile]) -> None:
        """`files`: those that are filled again; in the end those of the folder."""
        self._folder, self._files = folder, files
        self._parts: list[_Part] = []

    def add(self, name: str, dtype: str, shape: Sequence[int], data: Bytes) -> tuple[int, int, str]:
        """Writes a tensor: the number of its file, where it begins there, and the checksum of its bytes. `dtype`:
        safetensors' name."""
        start = self._parts[-1].file.length - HEAD_BYTES if self._parts else 0
        described = _described(name, dtype, shape, start, len(data))
        if not self._parts or len(self._parts[-1].table) + len(described) + 1 > HEAD_BYTES - 8:
            self._begin_part()
            described = _described(name, dtype, shape, 0, len(data))
        part = self._parts[-1]
        part.add(name, described)
        offset = part.file.reserve(len(data))
        return len(self._parts) - 1, offset, part.file.write_checked(offset, data)

    def finish(self) -> tuple[tuple[str, int, str], ...]:
        """Name, length of the head and its checksum, of each file in order."""
        for file in self._files[len(self._parts) :]:
            file.path.unlink()
            file.close()
        del self._files[len(self._parts) :]
        names = _file_names(len(self._parts))
        found = []
        for part, name in zip(self._parts, names, strict=True):
            found.append((name, HEAD_BYTES, part.write_head()))
            part.file.finish()
            part.file.move(self._folder / name)
        self._write_index(names)
        return tuple(found)

    def _begin_part(self) -> None:
        number = len(self._parts)
        if number == len(self._files):
            self._files.append(GrowingFile(self._folder / f"part-{number}"))
        file = self._files[number]
        file.reserve(HEAD_BYTES)
        self._parts.append(_Part(file))

    def _write_index(self, names: Sequence[str]) -> None:
        if len(names) == 1:
            (self._folder / _INDEX).unlink(missing_ok=True)
            return
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(part.file.length - HEAD_BYTES for part in self._parts)},
            "weight_map": {name: file for file, part in zip(names, self._parts, strict=True) for name in part.names},
        }
        (self._folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


def _described(name: str, dtype: str, shape: Sequence[int], start: int, count: int) -> bytes:
    sizes = ",".join(map(str, shape))
    offsets = f"{start},{start + count}"
    return f',{json.dumps(name)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{offsets}]}}'.encode()


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
