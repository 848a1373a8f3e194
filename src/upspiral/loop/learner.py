"""The learner: trains on batches and sees to it that the engine samples from what was learned."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from upspiral.engine.base import UpdatableEngine
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.errors import StaleBaseError
from upspiral.trainer.base import StepKind, StepMetrics, TrainerBackend
from upspiral.trainer.checkpoint import check_checkpoint, save_checkpoint
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.local import LocalTrainer
from upspiral.weights.cpu import use_threads
from upspiral.weights.publication import PublisherSettings

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class Learner(Protocol):
    """Called by one task at a time."""

    @property
    def publish_s(self) -> float:
        """How long it took, in seconds, until the engine had the last version: writing it, switching and the probe."""
        ...

    async def step(
        self, batches: Sequence[ForestBatch], *, version: int | None, kind: StepKind, lr: float | None = None
    ) -> StepMetrics:
        """Gradient and optimizer steps over the batches. Afterwards the engine has the new weights, and no token was
        sampled from them under an old version. `version` None: nobody samples before `publish`."""
        ...

    async def publish(self, version: int) -> None:
        """Gives the engine the weights as they are."""
        ...

    async def load(self, checkpoint: Path, *, version: int) -> None:
        """Goes on from a checkpoint; afterwards the engine has its weights. StoreError when it is damaged."""
        ...

    async def save(self, checkpoints: Path, step: int, *, keep: int) -> None:
        """Writes the checkpoint of a step; see `save_checkpoint`."""
        ...

    async def forget_moments(self) -> None:
        """Starts the optimizer anew on the weights as they are."""
        ...


class SharedLearner:
    """Trainer and engine share the weights in place and take turns on the engine's thread: nothing is copied."""

    publish_s = 0.0

    def __init__(self, trainer: LocalTrainer, engine: EmbeddedEngine) -> None:
        self._trainer, self._engine = trainer, engine

    async def step(
        self, batches: Sequence[ForestBatch], *, version: int | None, kind: StepKind, lr: float | None = None
    ) -> StepMetrics:
        def train_and_publish() -> StepMetrics:
            metrics = self._trainer.step(batches, kind=kind, lr=lr)
            if version is not None:
                self._engine.publish(version)
            return metrics

        return await self._engine.exclusive(train_and_publish)

    async def publish(self, version: int) -> None:
        await self._engine.exclusive(lambda: self._engine.publish(version))

    async def load(self, checkpoint: Path, *, version: int) -> None:
        await asyncio.to_thread(check_checkpoint, checkpoint)

        def load_and_publish() -> None:
            self._trainer.load(checkpoint)
            self._engine.publish(version)

        await self._engine.exclusive(load_and_publish)

    async def save(self, checkpoints: Path, step: int, *, keep: int) -> None:
        await asyncio.to_thread(save_checkpoint, checkpoints, step, self._trainer.save, keep=keep)

    async def forget_moments(self) -> None:
        self._trainer.forget_moments()


class PublishingLearner:
    """The trainer has weights of its own and publishes them to the engine. While they are written, the engine goes on
    sampling from the old ones, unless it sleeps."""

    def __init__(
        self,
        trainer: TrainerBackend,
        engine: UpdatableEngine,
        settings: PublisherSettings,
        *,
        threads: int,
        colocated: bool = False,
    ) -> None:
        """`threads`: CPU threads of what the trainer computes in this process. `colocated`: the engine sleeps while the
        trainer computes; what is published wakes it. After a step that failed it sleeps on."""
        self._trainer, self._engine, self._settings = trainer, engine, settings
        self._colocated = colocated
        self._publish_s = 0.0
        # Always the same thread: torch keeps a team of OpenMP threads for each that computes.
        self._thread = ThreadPoolExecutor(1, "trainer", initializer=use_threads, initargs=(threads,))

    async def step(
        self, batches: Sequence[ForestBatch], *, version: int | None, kind: StepKind, lr: float | None = None
    ) -> StepMetrics:
        await self._make_room()
        metrics = await self._run(lambda: self._trainer.step(batches, kind=kind, lr=lr))
        if version is not None:
            await self.publish(version)
        return metrics

    async def load(self, checkpoint: Path, *, version: int) -> None:
        await asyncio.to_thread(check_checkpoint, checkpoint)
        await self._make_room()
        await self._run(lambda: self._trainer.load(checkpoint))
        await self.publish(version)

    async def save(self, checkpoints: Path, step: int, *, keep: int) -> None:
        await self._run(lambda: save_checkpoint(checkpoints, step, self._trainer.save, keep=keep))

    async def forget_moments(self) -> None:
        await self._run(self._trainer.forget_moments)

    @property
    def publish_s(self) -> float:
        return self._publish_s

    async def publish(self, version: int) -> None:
        started = time.monotonic()
        try:
            await self._adopt(self._settings, version)
        except StaleBaseError as error:  # it lacks what the difference is to, or the difference is damaged
            _log.warning("version %d is published whole: %s", version, error)
            await self._adopt(replace(self._settings, form="full"), version)
        self._publish_s = time.monotonic() - started

    async def _make_room(self) -> None:
        if self._colocated:
            await self._engine.sleep()

    async def close(self) -> None:
        """Ends the trainer and the thread. What a cancelled call left computing is not waited for."""
        try:
            await asyncio.to_thread(self._trainer.close)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _adopt(self, settings: PublisherSettings, version: int) -> None:
        publication = await self._run(lambda: self._trainer.publish(settings, version))
        if self._colocated:
            await self._run(self._trainer.rest)
        await self._engine.update_weights(publication)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
