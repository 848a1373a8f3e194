"""Checkpoints: whole or absent, never half.

A checkpoint is a folder `step-000012` with `state.pt` and `manifest.json` (size and SHA-256 of the state). It is
written under another name, synced to the disk and renamed, so that a kill at any moment leaves the older ones as they
were.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from upspiral.errors import StoreError

_NAME = re.compile(r"step-(\d{6,})")
_STATE, _MANIFEST = "state.pt", "manifest.json"
_BLOCK_BYTES = 1 << 22


def save_checkpoint(folder: str | Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Writes the checkpoint of a step and removes all but the `keep` newest. Returns its folder.

    `state` holds tensors, numbers, strings, lists and dicts. Old checkpoints are removed only once the new one is
    safe, so the disk must hold one more than `keep`. Raises StoreError, naming the folder, the bytes needed and what to
    do, when it cannot be written; what was there before is then untouched.
    """
    folder = Path(folder)
    target, partial = folder / f"step-{step:06d}", folder / f".partial-step-{step:06d}"
    needed = _bytes_of(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, needed)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(partial, state)
        if target.exists():  # a resumed run repeats a step whose checkpoint proved unreadable
            shutil.rmtree(target)
        partial.rename(target)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, StoreError):
            raise
        raise StoreError(_cannot_write(folder, needed, str(error))) from error
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The folder of the newest complete checkpoint, or None."""
    found = _checkpoints(Path(folder))
    return found[-1] if found else None


def load_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` was given, on the CPU. Raises StoreError when it is damaged or unreadable."""
    checkpoint = Path(checkpoint)
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        if _digest(checkpoint / _STATE) != manifest["sha256"]:
            raise ValueError("its checksum does not match")
        return torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise StoreError(
            f"checkpoint {checkpoint} is damaged: {error}; remove that folder to resume from the one before it, or "
            "from the start if there is none (trajectories.db is not affected)"
        ) from error


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder belongs to."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise StoreError(f"{checkpoint} is not a checkpoint; their folders are called step-NNNNNN")
    return int(match[1])


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    complete = (path for path in folder.glob("step-*") if (path / _MANIFEST).is_file() and _NAME.fullmatch(path.name))
    return sorted(complete, key=step_of)


def _write(partial: Path, state: Mapping[str, Any]) -> None:
    with (partial / _STATE).open("wb") as raw:
        file = _HashingFile(raw)
        torch.save(dict(state), cast(BinaryIO, file))
        raw.flush()
        os.fsync(raw.fileno())
    with (partial / _MANIFEST).open("w") as manifest:
        json.dump({"sha256": file.digest.hexdigest(), "bytes": file.size}, manifest)
        manifest.flush()
        os.fsync(manifest.fileno())
    _sync_folder(partial)


class _HashingFile(io.RawIOBase):
    """Hashes what passes through, so that the file need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(_cannot_write(folder, needed, f"only {free:,} bytes are free"))


def _cannot_write(folder: Path, needed: int, why: str) -> str:
    return (
        f"cannot write a checkpoint of about {needed:,} bytes to {folder}: {why}; free space there or lower "
        "checkpoint.keep, then resume the run: earlier checkpoints are untouched"
    )


def _bytes_of(state: Any) -> int:
    """An upper estimate of the file's size."""
    if isinstance(state, torch.Tensor):
        return state.nbytes + 512
    if isinstance(state, Mapping):
        return sum(_bytes_of(value) for value in state.values()) + 1024
    if isinstance(state, Iterable) and not isinstance(state, str | bytes):
        return sum(_bytes_of(value) for value in state) + 1024
    return len(state) + 128 if isinstance(state, str | bytes) else 128


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
