"""Checkpoints: whole or absent, never half.

A checkpoint is a folder `step-000012` with the files of a trainer backend and `manifest.json`: their sizes and SHA-256.
It is written under another name, synced to the disk and renamed, so that a kill at any moment leaves the older ones as
they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from upspiral.errors import StoreError, TrainerError

_NAME = re.compile(r"step-(\d{6,})")
_MANIFEST = "manifest.json"


def save_checkpoint(folder: str | Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Writes the checkpoint of a step and removes all but the `keep` newest. Returns its folder.

    `write` fills an empty folder, such as `TrainerBackend.save`. Old checkpoints are removed only once the new one is
    safe, so the disk must hold one more than `keep`. Raises StoreError, naming the folder, the bytes needed and what to
    do, when it cannot be written; what was there before is then untouched.
    """
    folder = Path(folder)
    target, partial = folder / f"step-{step:06d}", folder / f".partial-step-{step:06d}"
    needed = _bytes_of(latest_checkpoint(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, needed)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        _seal(partial)
        if target.exists():  # a resumed run repeats a step whose checkpoint proved unreadable
            shutil.rmtree(target)
        partial.rename(target)
        _sync(folder)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, StoreError | TrainerError):
            raise
        raise StoreError(_cannot_write(folder, needed, str(error))) from error
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The folder of the newest complete checkpoint, or None."""
    found = _checkpoints(Path(folder))
    return found[-1] if found else None


def check_checkpoint(checkpoint: Path) -> None:
    """Raises StoreError when a file of it is missing or not as it was written."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_text())["files"]
        for name, written in files.items():
            if _digest(checkpoint / name) != written["sha256"]:
                raise ValueError(f"the checksum of {name} does not match")
    except (OSError, ValueError, KeyError) as error:
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


def _seal(partial: Path) -> None:
    """Writes the manifest, and everything to the disk."""
    files = {}
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        _sync(path)
        files[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    if not files:
        raise StoreError(f"the trainer wrote nothing into {partial}; is that folder the same one for all of its ranks?")
    manifest = partial / _MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1))
    for path in (manifest, *(path for path in partial.rglob("*") if path.is_dir()), partial):
        _sync(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(_cannot_write(folder, needed, f"only {free:,} bytes are free"))


def _cannot_write(folder: Path, needed: int, why: str) -> str:
    size = f" of about {needed:,} bytes" if needed else ""
    return (
        f"cannot write a checkpoint{size} to {folder}: {why}; free space there or lower checkpoint.keep, then resume "
        "the run: earlier checkpoints are untouched"
    )


def _bytes_of(checkpoint: Path | None) -> int:
    """The next one takes about as much as the last; 0: there is none to tell."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) if checkpoint else 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
