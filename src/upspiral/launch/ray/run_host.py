"""A run as an actor: gateway, agents and the loop, which makes the other actors and goes on when one of them dies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from upspiral.config.combinations import num_ranks
from upspiral.config.models import RunConfig
from upspiral.errors import ClusterError, ConfigError, EngineError, TrainerError, UpspiralError
from upspiral.launch.ray.cluster import joined
from upspiral.launch.ray.devices import hidden_without
from upspiral.launch.ray.pairs import check_room_for_pairs
from upspiral.launch.ray.placement import RayPlacement
from upspiral.launch.ray.reserved import ROOM_DEADLINE_S, give_back
from upspiral.loop.folder import check_resume, has_run
from upspiral.loop.run import RunResult, run_training
from upspiral.monitor.progress import LiveProgress
from upspiral.trainer.checkpoint import latest_checkpoint


def run_on_ray(config: RunConfig, folder: Path, *, resume: bool, room_deadline_s: float = ROOM_DEADLINE_S) -> RunResult:
    """Runs, or resumes, a training run in the cluster of its config, and prints its progress. `room_deadline_s`: how
    long the run itself waits for a place. Raises UpspiralError for anything that the user can mend."""

    folder = folder.resolve()
    check_resume(folder, resume=resume)
    ranks = 0 if config.trainer.kind == "local" else num_ranks(config)
    with joined(config.cluster, ranks):
        check_room_for_pairs(config)
        for death in range(1, config.cluster.restarts + 2):
            result = _once_placed(config, folder, room_deadline_s)
            if not isinstance(result, str):
                return result
            print(f"the run's actor died ({death} times): {result}\nanother one goes on from what it had committed")
    raise ClusterError(f"the run's actor died more often than cluster.restarts = {config.cluster.restarts} allows")


def _once_placed(config: RunConfig, folder: Path, room_deadline_s: float) -> RunResult | str:
    """What the run's actor returns; why it died."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

    host: Any = ray.remote(RunHost).options(num_cpus=1, num_gpus=_gpus(config))
    try:
        placed = host.remote(config, folder)
        try:
            ray.get(placed.begin.remote(), timeout=room_deadline_s)
            return ray.get(placed.run.remote())
        except RayActorError as error:
            ray.kill(placed)  # one that cannot be reached may live
            return str(error)
    except GetTimeoutError:
        raise ConfigError(
            f"the cluster had no room for the run itself, 1 CPU and {_gpus(config):g} GPUs (cluster.rank_gpus "
            f'with trainer.kind = "local"), within {room_deadline_s:.0f} s; end other runs or add nodes'
        ) from None
    except RayTaskError as error:  # a bug is told with what Ray knows of it
        raise error.cause if isinstance(error.cause, UpspiralError) else error from None
    except (ConnectionError, RayError) as error:
        raise ClusterError(f'the run in cluster.address = "{config.cluster.address}" is lost: {error}') from error


class RunHost:
    """The actor. When it dies another one is made, and its run goes on from what was committed."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        os.environ |= hidden_without(_gpus(config))

    def begin(self) -> None:
        """Answers once the actor has its place."""

    def run(self) -> RunResult:
        """Goes on until it has failed `cluster.restarts` times since its last checkpoint. An engine that fails before
        there is one never ran: that is no accident."""
        give_back(self._folder)
        resume, restarts, reached = has_run(self._folder), 0, self._checkpoint()
        while True:
            try:
                return self._once(resume)
            except (TrainerError, EngineError) as error:
                before, reached = reached, self._checkpoint()
                restarts = 1 if reached != before else restarts + 1
                if restarts > self._config.cluster.restarts or (reached is None and isinstance(error, EngineError)):
                    raise
                print(f"{error}\nthe run goes on from its checkpoint ({restarts} of {self._config.cluster.restarts})")
                resume = has_run(self._folder)

    def _checkpoint(self) -> Path | None:
        return latest_checkpoint(self._folder / "checkpoints")

    def _once(self, resume: bool) -> RunResult:
        progress = LiveProgress(self._config.name, self._config.steps, budget_minutes=self._config.budget_minutes)
        return run_training(self._config, self._folder, resume=resume, progress=progress, placement=RayPlacement())


def _gpus(config: RunConfig) -> float:
    """A local trainer is the run's own."""
    return config.cluster.rank_gpus if config.trainer.kind == "local" else 0.0
