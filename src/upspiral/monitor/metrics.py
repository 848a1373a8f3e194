"""metrics.jsonl: what a run measured, one JSON object a line, readable by people and scripts.

Every line has "kind", "step" and "time" (seconds since the epoch). Kinds: "warm_start", "step", "eval", "note". The
file only grows; `read_metrics` decides which lines still count after a resume. What the lines hold: `monitor/lines.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from upspiral.errors import StoreError

MetricKind = Literal["warm_start", "step", "eval", "note"]
FILE_NAME = "metrics.jsonl"
_MEASURED = frozenset({"warm_start", "step", "eval"})


class MetricsLog:
    """Appends lines to RUN/metrics.jsonl. Each line is handed to the operating system before `append` returns, so a
    killed process loses none; it is not synced to the disk, so a power failure may.

    Numbers that are not finite are written as null, since JSON has no NaN. Numpy scalars and arrays are accepted.
    """

    def __init__(self, run_folder: Path) -> None:
        """Opens or creates the file. A line torn by a crash is cut off. Raises StoreError when that fails."""
        self.path = Path(run_folder) / FILE_NAME
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            _cut_torn_line(self._descriptor)
        except OSError as error:
            raise _store_error(self.path, "opened", error) from error

    def append(self, kind: MetricKind, step: int, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one line and returns it. Raises StoreError when the disk is full or the file cannot be written."""
        if kind not in get_args(MetricKind):
            raise ValueError(f"metric kind {kind!r} is none of {', '.join(get_args(MetricKind))}")
        line = {**fields, "kind": kind, "step": step, "time": time.time()}
        encoded = orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS) + b"\n"
        try:
            written = 0
            while written < len(encoded):
                written += os.write(self._descriptor, encoded[written:])
        except OSError as error:
            with suppress(OSError):  # A half-written line would spoil the next one.
                _cut_torn_line(self._descriptor)
            raise _store_error(self.path, "written", error) from error
        return orjson.loads(encoded)

    def note(self, step: int, text: str, **fields: Any) -> dict[str, Any]:
        """A remark for people. `finished=True` marks the end of a run that was not cut short by a crash."""
        return self.append("note", step, {"text": text, **fields})

    def resumed(self, step: int) -> dict[str, Any]:
        """Says that the run goes on with `step`: what was measured before at that step or later no longer counts."""
        return self.note(step, f"resumed at step {step}", supersedes_from=step)

    def close(self) -> None:
        """Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines that count, in the order they were written; an empty list when nothing was measured yet.

    Of several lines with the same kind and step (for "eval" also the same "split" and "temperature") only the last
    counts, and none from before a resume at or above the resumed step. Notes all count. Safe while a run is writing.
    Raises StoreError, with the line number, for a line that is not a JSON object.
    """
    path = Path(run_folder) / FILE_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _store_error(path, "read", error) from error
    counting: dict[object, dict[str, Any]] = {}
    # What follows the last newline is still being written, or was torn by a crash.
    for number, text in enumerate(content.split(b"\n")[:-1], start=1):
        line = _parse(text, path, number)
        if "supersedes_from" in line:
            _forget_from(counting, line["supersedes_from"])
        key = _key(line, number)
        counting.pop(key, None)
        counting[key] = line
    return list(counting.values())


def _key(line: Mapping[str, Any], number: int) -> object:
    if line["kind"] == "eval":
        return "eval", line["step"], line.get("split"), line.get("temperature")
    if line["kind"] == "note":
        return "note", number
    return line["kind"], line["step"]


def _forget_from(counting: dict[object, dict[str, Any]], step: int) -> None:
    gone = [key for key, line in counting.items() if line["kind"] in _MEASURED and line["step"] >= step]
    for key in gone:
        del counting[key]


def _parse(text: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        line = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise StoreError(f"{path}, line {number} is not JSON ({error}); repair or delete that line") from error
    if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
        raise StoreError(f'{path}, line {number} is no metrics line (an object with "kind" and "step"); delete it')
    return line


def _cut_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - 4096)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        end = start + newline + 1
        if newline >= 0 or start == 0:
            break
    if end != size:
        os.ftruncate(descriptor, end)


def _store_error(path: Path, verb: str, error: OSError) -> StoreError:
    reason = error.strerror or str(error)
    return StoreError(f"{path} could not be {verb}: {reason}. Free space or mend its permissions, then resume the run.")
