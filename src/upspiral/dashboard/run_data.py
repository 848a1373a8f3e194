"""A run folder, opened for reading: config, measurements, trajectories. Whatever a killed run left is enough."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from upspiral.errors import StoreError
from upspiral.monitor.environment import describe_environment, read_environment
from upspiral.monitor.metrics import read_metrics
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Rollout

CONFIG_NAME = "config.resolved.toml"
STORE_NAME = "trajectories.db"


@dataclass(frozen=True)
class RunData:
    """What the report and the viewer read. `store` is None when the run stopped before its first rollout."""

    folder: Path
    config_text: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    store: TrajectoryStore | None

    @classmethod
    def open(cls, folder: Path) -> RunData:
        """Raises StoreError when the folder is no run folder or one of its files cannot be read."""
        folder = Path(folder)
        present = [name for name in (CONFIG_NAME, "metrics.jsonl", STORE_NAME) if (folder / name).is_file()]
        if not present:
            what = "is no run folder" if folder.is_dir() else "does not exist"
            raise StoreError(
                f"{folder} {what}: it has none of {CONFIG_NAME}, metrics.jsonl and {STORE_NAME}; give the folder that "
                "`upspiral run` wrote, for example runs/demo"
            )
        text = (folder / CONFIG_NAME).read_text() if CONFIG_NAME in present else ""
        store = TrajectoryStore(folder / STORE_NAME, create=False) if STORE_NAME in present else None
        return cls(folder, text, _parse_config(text, folder), read_metrics(folder), store)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def model(self) -> str:
        return str(self.config.get("model", {}).get("path", ""))

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """ "step" lines by step."""
        return sorted(self._of_kind("step"), key=lambda line: line["step"])

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """ "eval" lines by step, all at the temperature of the newest one, so that they can be compared."""
        lines = sorted(self._of_kind("eval"), key=lambda line: line["step"])
        return [line for line in lines if line.get("temperature") == lines[-1].get("temperature")]

    @cached_property
    def warm_starts(self) -> list[dict[str, Any]]:
        return self._of_kind("warm_start")

    @cached_property
    def notes(self) -> list[dict[str, Any]]:
        return self._of_kind("note")

    @property
    def planned_steps(self) -> int | None:
        return self.config.get("steps")

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: it said so last, or made all its steps and measured them."""
        endings = [note for note in self.notes if note.get("finished") or "supersedes_from" in note]
        if endings:
            return bool(endings[-1].get("finished"))
        if self.planned_steps is None or len(self.steps) < self.planned_steps:
            return False
        evaluated = bool(self.evaluations) and self.evaluations[-1]["step"] >= self.steps[-1]["step"]
        return evaluated or self.config.get("eval", {}).get("tasks") == 0

    @property
    def wall_s(self) -> float:
        """Seconds from the first measurement to the last, pauses of a resumed run included."""
        times = [line["time"] for line in self.lines if "time" in line]
        return max(times) - min(times) if times else 0.0

    def environment(self) -> tuple[dict[str, Any], bool]:
        """The facts, and whether they were recorded by the run itself rather than found just now."""
        recorded = read_environment(self.folder)
        return (recorded, True) if recorded is not None else (describe_environment(), False)

    def rollouts(self, *, split: str | None = None, step: int | None = None) -> list[Rollout]:
        return self.store.rollouts(split=split, step=step) if self.store else []

    def close(self) -> None:
        if self.store:
            self.store.close()

    def __enter__(self) -> RunData:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]


def _parse_config(text: str, folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise StoreError(f"{folder / CONFIG_NAME} is not TOML ({error}); restore it from the run file") from error
