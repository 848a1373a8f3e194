"""DeepSpeed as a trainer backend: optimizer states, gradients and weights divided among the ranks by ZeRO.

Not supported: tensor and expert parallel layers, low-rank factors, weights that are their own masters in bfloat16, and
offload to the host or to disks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, distributed

from upspiral.config.models import ParallelConfig
from upspiral.errors import ConfigError, StoreError
from upspiral.trainer.attention import ForestPass, forest_attention_in
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.deepspeed.engine import ZeroEngine
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.rank_backend import RankBackend
from upspiral.trainer.rounds import Turn
from upspiral.trainer.routes import replayed_routes_in
from upspiral.weights.load import load_module
from upspiral.weights.publication import Publication, PublisherSettings

_ABOUT = "deepspeed.json"


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a checkpoint is divided; another engine has to be divided in the same way to read it."""

    ranks: int
    zero_stage: int
    dtype: str
    parameters: list[list[int]]
    """Their shapes, in the module's order."""


class DeepSpeedBackend(RankBackend):
    """See `TrainerBackend`. All ranks hold different data; the model must fit into the memory of one while it is
    loaded."""

    def __init__(self, setup: TrainerSetup) -> None:
        """Raises ConfigError for what is not supported."""
        parallel = _checked(setup)
        super().__init__(setup, distributed.group.WORLD)
        self._module = load_module(setup.model_folder, setup.dtype)
        self._layout = _Layout(
            parallel.ranks, parallel.zero_stage, setup.dtype, [list(each.shape) for each in self._module.parameters()]
        )
        self._engine = ZeroEngine(self._module, setup, parallel.zero_stage)

    def publish(self, settings: PublisherSettings, version: int) -> Publication:
        return self._publish_together(self._engine.weights(), self._module.config, settings, version)

    def save(self, folder: Path) -> None:
        self._engine.save(folder)
        if distributed.get_rank() == 0:
            about = {"layout": asdict(self._layout), "policy_steps": self._policy_steps}
            (folder / _ABOUT).write_text(json.dumps(about))
        distributed.barrier()

    def load(self, folder: Path) -> None:
        try:
            about = json.loads((folder / _ABOUT).read_text())
        except OSError as error:
            raise StoreError(f'{folder} is no checkpoint of trainer.kind = "deepspeed": {error}') from error
        written = _Layout(**about["layout"])
        if written != self._layout:
            raise StoreError(
                f"{folder} was written by {written.ranks} ranks in ZeRO stage {written.zero_stage} and "
                f"{written.dtype}, and here are {self._layout.ranks} in stage {self._layout.zero_stage} and "
                f"{self._layout.dtype}, or the model is another one; resume with the same trainer.parallel and model, "
                "or start a new run from the exported weights"
            )
        self._engine.load(folder)
        self._policy_steps = about["policy_steps"]

    def forget_moments(self) -> None:
        self._engine.forget_moments()

    def close(self) -> None:
        self._engine.close()

    def _logprobs(self, batch: ForestBatch, forest: ForestPass, temperature: float) -> tuple[Tensor, Tensor]:
        return self._engine.forward(batch, forest, temperature)

    def _backward(self, turn: Turn) -> None:
        self._engine.backward(turn.lane.ends(turn.work))

    def _update(self, lr: float) -> float:
        return self._engine.step(lr)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(forest_attention_in(self._module))
            stack.enter_context(replayed_routes_in(self._module))
            yield


def _checked(setup: TrainerSetup) -> ParallelConfig:
    parallel = setup.trainer.parallel or ParallelConfig()
    given = {
        "trainer.parallel.tensor": (parallel.tensor, 1),
        "trainer.parallel.expert": (parallel.expert, 1),
        "trainer.lora": (setup.trainer.lora, None),
        "trainer.master_weights": (setup.trainer.master_weights, "float32"),
    }
    for key, (value, only) in given.items():
        if value != only:
            raise ConfigError(f'{key} = {value!r}, but trainer.kind = "deepspeed" supports {only!r} alone')
    if parallel.ranks != distributed.get_world_size():
        raise ConfigError(
            f"trainer.parallel.ranks = {parallel.ranks}, but {distributed.get_world_size()} ranks were started"
        )
    return parallel
