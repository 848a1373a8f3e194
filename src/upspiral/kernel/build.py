"""Compiles our C++ once for this machine and loads it. No headers of torch and no build system: one call of a compiler.

Where it cannot be compiled or the processor lacks the instructions, `load` says why and callers go on in torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from upspiral.weights.models import cache_folder

_log = logging.getLogger(__name__)

_DEADLINE_S = 300.0
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "fma")
# Without contraction a product and a sum are rounded apart, wherever the compiler inlines them.
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")


@cache
def load(name: str) -> ctypes.CDLL | None:
    """The library made from `name`.cpp beside this file; None, with a line in the log that says why, where there cannot
    be one. Libraries are kept in the cache, by source, flags and compiler."""
    source = Path(__file__).with_name(f"{name}.cpp")
    reason = missing_instructions()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not reason and not compiler:
        reason = "there is no C++ compiler (g++, or the one that CXX names)"
    if not reason:
        try:
            return ctypes.CDLL(str(_compiled(source, str(compiler))))
        except (OSError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            reason = f"{compiler} did not make it: {output.strip().splitlines()[0] if output.strip() else 'no message'}"
    _log.warning("%s is computed by torch, which is slower: %s", name.replace("_", " "), reason)
    return None


def missing_instructions() -> str:
    """Which instructions of the processor our code needs and does not find, as a sentence; empty when all are there."""
    try:
        found = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        ).split()
    except (OSError, StopIteration):
        return "the processor does not say what it can do (no flags in /proc/cpuinfo)"
    missing = [name for name in _INSTRUCTIONS if name not in found]
    return f"the processor has no {', '.join(missing)}" if missing else ""


def _compiled(source: Path, compiler: str) -> Path:
    flags = (*_FLAGS, *(f"-m{name.replace('_', '')}" for name in _INSTRUCTIONS))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    sources = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join((*sources, *flags, version)).encode()).hexdigest()[:16]
    library = cache_folder().parent / "kernels" / f"{source.stem}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that the last move is a rename: several processes may get here at once.
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            made = Path(work) / library.name
            command = [compiler, *flags, str(source), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=True)
            made.replace(library)
    return library
