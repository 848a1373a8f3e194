"""Where a run's engine and trainer live. This machine is one place; `launch/` has others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from upspiral.config.models import ParallelConfig, RunConfig
from upspiral.engine.base import UNPUBLISHED_VERSION, Engine, UpdatableEngine
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.errors import ConfigError
from upspiral.loop.learner import Learner, PublishingLearner, SharedLearner
from upspiral.loop.servers import servers
from upspiral.sandbox.base import SandboxBackend
from upspiral.trainer.base import TrainerBackend, TrainerSetup
from upspiral.trainer.local import LocalTrainer
from upspiral.trainer.rank_processes import start_ranks
from upspiral.trainer.ranks import Rank, Ranks
from upspiral.weights.cpu import keep_freed_memory, num_cores
from upspiral.weights.load import LoadedModel, load_model
from upspiral.weights.publication import PublisherSettings
from upspiral.weights.shared_folder import shared_folder


@dataclass(frozen=True, slots=True)
class Setting:
    """What the parts of a run are made from."""

    config: RunConfig
    model_folder: Path
    folder: Path
    """Of the run."""
    stack: AsyncExitStack
    """Stops what was started when the run ends."""


class Placement(Protocol):
    """A place for what does not share the memory of the run."""

    async def engine(self, setting: Setting) -> UpdatableEngine:
        """The engine, started, with the weights of the model's folder, as UNPUBLISHED_VERSION."""
        ...

    async def ranks(self, count: int, setting: Setting) -> Sequence[Rank]:
        """Processes for the ranks of a trainer."""
        ...

    async def weights_root(self, setting: Setting) -> Path:
        """A folder in the shared memory of the trainer's machine, where it publishes; gone when the run ends. The
        engines have what is published there."""
        ...

    def share(self, argument: Any) -> Any:
        """What stands for a large argument in calls of the ranks: it is handed over once and not to each of them."""
        ...

    async def sandboxes(self, config: RunConfig, egress_log: Path) -> SandboxBackend | None:
        """Where sandboxes are made; None: as [sandbox] says."""
        ...


class ThisMachine:
    """Engines and ranks as processes and threads of this machine; servers that run elsewhere by their addresses."""

    def __init__(self, *, waits: bool = True) -> None:
        """`waits`: for engines that die to be started again. Who has others to turn to meanwhile does not."""
        self._waits = waits

    async def engine(self, setting: Setting) -> UpdatableEngine:
        config = setting.config
        threads, cpu = num_threads(config), device_of(config) == "cpu"
        if config.engine.kind == "embedded":
            engine = EmbeddedEngine(load(setting), config.engine, seed=config.seed, threads=threads)
            engine.publish(UNPUBLISHED_VERSION)
        else:
            logs = setting.folder / "logs"
            engine = servers(config, setting.model_folder, logs, cpu=cpu, threads=threads, waits=self._waits)
        setting.stack.push_async_callback(engine.stop)
        await engine.start()
        return engine

    async def ranks(self, count: int, setting: Setting) -> Sequence[Rank]:
        return start_ranks(count, setting.folder / "logs")

    async def weights_root(self, setting: Setting) -> Path:
        return setting.stack.enter_context(shared_folder())

    def share(self, argument: Any) -> Any:
        return argument

    async def sandboxes(self, config: RunConfig, egress_log: Path) -> SandboxBackend | None:
        return None


async def make_policy(setting: Setting, placement: Placement | None) -> tuple[Engine, Learner]:
    """The engine and who teaches it. `placement` None: this machine, where an embedded engine and a local trainer
    share one copy of the weights."""
    config = setting.config
    prepare_process(config)
    here = placement is None or config.trainer.kind == "local"  # and not where Ray has GPUs
    if here and config.model.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('model.device = "cuda" but torch sees no CUDA device; use "auto" or "cpu"')
    if placement is None and config.engine.kind == "embedded" and config.trainer.kind == "local":
        return await _shared(setting)
    placement = placement or ThisMachine()
    engine, colocated = await placement.engine(setting), config.engine.colocated
    if colocated:
        await engine.sleep()  # the trainer is made where the engine was
    trainer = await _trainer(setting, placement)
    setting.stack.push_async_callback(asyncio.to_thread, trainer.close)  # if nothing below gets that far
    published, threads = await _publisher_settings(setting, placement), num_threads(config)
    learner = PublishingLearner(trainer, engine, published, threads=threads, colocated=colocated)
    setting.stack.push_async_callback(learner.close)  # last, so first: weights go after the trainer that writes them
    return engine, learner


def prepare_process(config: RunConfig) -> None:
    """Before anything computes in a process that has an engine or a trainer."""
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)  # the threads that compute take the cores; see engine/embedded/engine.py
    keep_freed_memory()


def num_lanes(config: RunConfig) -> int:
    """Into how many lanes the batches of a step are dealt: one for each data-parallel rank, or for each CPU thread of a
    trainer in this process. A GPU is full with one microbatch, and every lane more would hold gradients of its own."""
    if config.trainer.kind != "local":
        parallel = config.trainer.parallel or ParallelConfig()
        return parallel.ranks // parallel.tensor
    return num_threads(config)


def num_threads(config: RunConfig) -> int:
    """CPU threads that compute: for the engine they share one step, for the local trainer each has a microbatch."""
    return 1 if device_of(config) == "cuda" else config.model.threads or num_cores()


def device_of(config: RunConfig) -> Literal["cpu", "cuda"]:
    if config.model.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.model.device


def load(setting: Setting) -> LoadedModel:
    return load_model(setting.model_folder, dtype=setting.config.model.dtype, device=device_of(setting.config))


async def _shared(setting: Setting) -> tuple[EmbeddedEngine, SharedLearner]:
    config, model, threads = setting.config, load(setting), num_threads(setting.config)
    setup = trainer_setup(config, setting.model_folder)
    trainer = LocalTrainer.of(model.module, setup, lanes=threads, exact=config.engine.exact)
    engine = EmbeddedEngine(model, config.engine, seed=config.seed, threads=threads)
    await engine.start()
    setting.stack.push_async_callback(engine.stop)
    return engine, SharedLearner(trainer, engine)


async def _trainer(setting: Setting, placement: Placement) -> TrainerBackend:
    config, setup = setting.config, trainer_setup(setting.config, setting.model_folder)
    if config.trainer.kind == "local":
        exact = config.engine.exact
        return LocalTrainer.of(load(setting).module, setup, lanes=num_threads(config), exact=exact)
    count = config.trainer.parallel.ranks if config.trainer.parallel else 1
    ranks = await placement.ranks(count, setting)
    return await asyncio.to_thread(lambda: Ranks(ranks, config.trainer.kind, setup, share=placement.share))


def trainer_setup(config: RunConfig, model_folder: Path) -> TrainerSetup:
    """What every backend of the run's trainer is made from."""
    return TrainerSetup(
        model_folder=model_folder,
        dtype=config.model.dtype,
        device=device_of(config) if config.trainer.kind == "local" else config.model.device,
        trainer=config.trainer,
        algorithm=config.algorithm,
        temperature=config.temperature,
        seed=config.seed,
    )


async def _publisher_settings(setting: Setting, placement: Placement) -> PublisherSettings:
    config = setting.config
    shared = config.weights.transport == "shared" or (
        config.weights.transport == "auto" and not (config.engine.server and config.engine.server.urls)
    )
    root = await placement.weights_root(setting) if shared else setting.folder / "weights"
    return PublisherSettings(root.resolve(), form=config.weights.form)
