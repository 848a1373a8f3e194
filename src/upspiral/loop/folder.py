"""A run is a folder: everything about it can be read by a person or a script (DESIGN section 4)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from upspiral.config.loader import dump_toml, load_run_config
from upspiral.config.models import RunConfig
from upspiral.errors import ConfigError
from upspiral.trainer.registry import RESHARDING

# Keys that change nothing about what was learned so far; all others must be as they were when a run is resumed.
MAY_CHANGE_ON_RESUME = (
    "steps", "budget_minutes", "checkpoint", "agent.workers", "agent.concurrency", "model.threads", "sandbox.backend",
    "sandbox.url", "sandbox.trust_commands", "cluster", "engine.colocated", "weights", "trainer.parallel.listen",
)  # fmt: skip
_DIVISION = "trainer.parallel"
"""May change as well where the trainer's checkpoints are read by any number of ranks."""
_RESOLVED = "config.resolved.toml"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of a run. The lock makes sure that one process at a time runs it."""

    path: Path
    lock: int

    @classmethod
    def open(cls, path: Path, config: RunConfig, *, resume: bool) -> RunFolder:
        """Creates or reopens the folder, which is a run's only from `begin` on. Raises ConfigError when it holds
        another run, is in use, or resume has nothing to resume."""
        resolved = path / _RESOLVED
        check_resume(path, resume=resume)
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path)
        try:
            if resume:
                _check_same_run(load_run_config(resolved, ()), config, resolved)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock)

    def begin(self, config: RunConfig) -> None:
        """Everything that the run needs is there. What failed before can be mended and started again as a new run."""
        partial = self.path / f"{_RESOLVED}.partial"
        partial.write_text(dump_toml(config), encoding="utf-8")
        partial.replace(self.path / _RESOLVED)  # a run that is killed here can still be resumed

    @property
    def store(self) -> Path:
        return self.path / "trajectories.db"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def egress_log(self) -> Path:
        """Connections out of sandboxes, a JSON object a line."""
        return self.path / "egress.jsonl"

    @property
    def gateway_socket(self) -> Path:
        return self.path / "gateway.sock"

    def close(self) -> None:
        os.close(self.lock)


def check_resume(path: Path, *, resume: bool) -> None:
    """Raises ConfigError when there is nothing to resume, or something that would be overwritten."""
    if resume and not has_run(path):
        raise ConfigError(f"--resume: {path} holds no run (config.resolved.toml); start one without --resume")
    if not resume and has_run(path):
        raise ConfigError(f"{path} holds a run; go on with it by --resume, or choose another folder by --run")


def has_run(path: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (path / _RESOLVED).exists()


def lock_folder(path: Path) -> int:
    """A handle that keeps other processes out of the folder until it is closed or this process dies. Raises ConfigError
    when another one holds it."""
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ConfigError(f"{path} is in use by another upspiral process; stop it first") from error
    return handle


def _check_same_run(before: RunConfig, now: RunConfig, resolved: Path) -> None:
    was, given = _flat(before.model_dump()), _flat(now.model_dump())
    free = (*MAY_CHANGE_ON_RESUME, *((_DIVISION,) if now.trainer.kind in RESHARDING else ()))
    changed = sorted(key for key in {*was, *given} if was.get(key) != given.get(key) and not key.startswith(free))
    if changed:
        listed = ", ".join(f"{key} was {was.get(key)!r}, is {given.get(key)!r}" for key in changed)
        divided = all(key.startswith(_DIVISION) for key in changed)
        why = f" (trainer.kind = {now.trainer.kind!r} reads only checkpoints of its own division)" if divided else ""
        raise ConfigError(
            f"--resume: this is not the run of {resolved}: {listed}{why}; set them back or start a new run"
        )


def _flat(section: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Values by their dotted keys."""
    flat: dict[str, object] = {}
    for key, value in section.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
