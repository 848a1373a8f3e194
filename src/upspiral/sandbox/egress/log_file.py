"""Connections out of sandboxes, written to a file while they happen."""

from __future__ import annotations

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
        with self._path.open("ab") as file:
            file.write(orjson.dumps(asdict(record), option=orjson.OPT_APPEND_NEWLINE))
