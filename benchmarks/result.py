"""The one JSON line that every benchmark prints last."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def report(benchmark: str, figures: dict[str, Any], targets: dict[str, Any], *, save: bool) -> None:
    """Prints the result; with `save` also writes it to benchmarks/results/NAME.json."""
    line = {
        "benchmark": benchmark,
        "figures": figures,
        "targets": targets,
        "machine": machine(),
        "commit": commit(),
    }
    if save:
        target = ROOT / "benchmarks" / "results" / f"{benchmark}.json"
        target.write_text(json.dumps(line, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(line), flush=True)


def saved_figures(benchmark: str) -> dict[str, Any]:
    """Of benchmarks/results/NAME.json; none when there is no such file."""
    path = ROOT / "benchmarks" / "results" / f"{benchmark}.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


def commit() -> str:
    """Results that were saved meanwhile do not make it dirty."""
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
