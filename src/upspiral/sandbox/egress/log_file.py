"""Connections out of sandboxes, written to a file while they happen."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import orjson

from upspiral.sandbox.egress.record import EgressRecord


class EgressFile:
    """One JSON object a line, made of an EgressRecord; there is no file before the first connection. What a kill leaves
    of a line is ended by the next one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, record: EgressRecord) -> None:
        with self._path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":
                file.write(b"\n")
            file.write(orjson.dumps(asdict(record), option=orjson.OPT_APPEND_NEWLINE))
