"""On what machine and with which packages a run ran: RUN/environment.json."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from upspiral.errors import StoreError

FILE_NAME = "environment.json"
_PACKAGES = ("upspiral", "torch", "transformers", "tokenizers", "numpy", "pydantic", "openai")


def describe_environment() -> dict[str, str]:
    """Facts of this machine in words. Imports none of the packages that it names; leaves out what is not there."""
    facts = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
    }
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def write_environment(run_folder: Path) -> Path:
    """Writes environment.json for people who read the run later. Raises StoreError when it cannot."""
    path = Path(run_folder) / FILE_NAME
    try:
        path.write_bytes(orjson.dumps(describe_environment(), option=orjson.OPT_INDENT_2))
    except OSError as error:
        raise StoreError(f"{path} could not be written: {error.strerror}; free space and start again") from error
    return path


def read_environment(run_folder: Path) -> dict[str, Any] | None:
    """What `write_environment` wrote; None when there is nothing readable."""
    try:
        facts = orjson.loads((Path(run_folder) / FILE_NAME).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    return facts if isinstance(facts, dict) else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
