"""A run is a folder: everything about it can be read by a person or a script (DESIGN section 4)."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

from upspiral.config.loader import dump_toml, load_run_config
from upspiral.config.models import RunConfig
from upspiral.errors import ConfigError

# Keys that change nothing about what was learned so far; all others must be as they were when a run is resumed.
MAY_CHANGE_ON_RESUME = (
    "steps", "budget_minutes", "checkpoint", "agent.workers", "agent.concurrency", "model.threads", "sandbox.backend",
    "sandbox.url", "sandbox.trust_commands", "cluster",
)  # fmt: skip


_RESOLVED = "config.resolved.toml"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of a run. The lock makes sure that one process at a time runs it."""

    path: Path
    resumed: bool
    lock: int

    @classmethod
    def open(cls, path: Path, config: RunConfig, *, resume: bool) -> RunFolder:
        """Creates or reopens the folder. Raises ConfigError when it holds another run, is in use, or resume has
        nothing to resume."""
        resolved = path / _RESOLVED
        check_resume(path, resume=resume)
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(path)
        if resume:
            _check_same_run(load_run_config(resolved, ()), config, resolved)
        resolved.write_text(dump_toml(config), encoding="utf-8")
        return cls(path, resume, lock)

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
    changed = sorted(
        key
        for key in {*_flat(before), *_flat(now)}
        if _flat(before).get(key) != _flat(now).get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    )
    if changed:
        listed = ", ".join(f"{key} was {_flat(before).get(key)!r}, is {_flat(now).get(key)!r}" for key in changed)
        raise ConfigError(f"--resume: this is not the run of {resolved}: {listed}; set them back or start a new run")


def _flat(config: RunConfig) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in config.model_dump().items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": content for inner, content in value.items()})
        else:
            flat[key] = value
    return flat
