"""Megatron-core as a trainer backend: tensor-parallel and data-parallel ranks of its GPTModel.

Not supported: expert, pipeline, context and sequence parallel layers, Transformer Engine, low-rank factors, weights in
bfloat16 without masters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from upspiral.config.models import ParallelConfig
from upspiral.errors import ConfigError
from upspiral.trainer.attention import ForestPass
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.division import divided_counts
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.gradients import GradientSums, whole_weights
from upspiral.trainer.megatron.cpu import pretend_that_cpu_is_a_device
from upspiral.trainer.megatron.model import MegatronModel, expert_pattern
from upspiral.trainer.megatron.names import Names
from upspiral.trainer.megatron.optimizer import DividedAdamW
from upspiral.trainer.megatron.state import load_state, save_state
from upspiral.trainer.rank_backend import RankBackend
from upspiral.trainer.rounds import Turn
from upspiral.weights.model_files import ModelFiles
from upspiral.weights.publication import Publication, PublisherSettings


class MegatronBackend(RankBackend):
    """See `TrainerBackend`. A checkpoint can be loaded with another number of ranks, however they divide the model."""

    def __init__(self, setup: TrainerSetup) -> None:
        """Raises ConfigError, naming the key, for what this backend does not do. On a CPU it is for tests only."""
        files = ModelFiles(setup.model_folder)
        parallel = _checked(setup, files.config)
        if setup.device == "cpu":
            pretend_that_cpu_is_a_device()
        if parallel_state.model_parallel_is_initialized():  # by a backend of this process that nobody closed
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=parallel.tensor)
        self._tensor: Any = parallel_state.get_tensor_model_parallel_group()
        data: Any = parallel_state.get_data_parallel_group()
        super().__init__(setup, data)
        self._mesh = DeviceMesh.from_group(self._tensor, setup.device)
        self._names = Names(files.config)
        self.model = MegatronModel(
            files.skeleton(), dtype=getattr(torch, setup.dtype), device=setup.device, group=self._tensor
        )
        self._read(files)
        parameters: dict[str, Tensor] = dict(self.model.module.named_parameters())
        self._sums = GradientSums([whole_weights(self.model.module)])
        divided = {
            name for name, each in parameters.items()
            if any(part.dimension is not None for part in self._names.parts(name, each))
        }  # fmt: skip
        self._optimizer = DividedAdamW(parameters, setup.trainer, data=data, tensor=self._tensor, divided=divided)

    def publish(self, settings: PublisherSettings, version: int) -> Publication:
        weights = self._names.gathered(self.model.module, self._tensor)
        return self._publish_together(weights, self._names.config, settings, version)

    def save(self, folder: Path) -> None:
        save_state(folder, self._names, self._optimizer, self._mesh, self._policy_steps)

    def load(self, folder: Path) -> None:
        self._policy_steps = load_state(folder, self._names, self._optimizer, self._mesh)

    def forget_moments(self) -> None:
        self._optimizer.adamw.forget_moments()

    def close(self) -> None:
        # Megatron would forget its groups, and the threads of each look for work a hundred times a second.
        for group in {*(parallel_state._global_process_group_list or ())} - {None}:
            distributed.destroy_process_group(group)
        parallel_state.destroy_model_parallel()

    def _logprobs(self, batch: ForestBatch, forest: ForestPass, temperature: float) -> tuple[Tensor, Tensor]:
        return self.model.target_logprobs(batch, forest, temperature)

    def _backward(self, turn: Turn) -> None:
        with self._sums.collected([0]) as turns, turns.taken_by(0):
            super()._backward(turn)

    def _update(self, lr: float) -> float:
        return self._optimizer.update(self._sums, lr)

    @torch.no_grad()
    def _read(self, files: ModelFiles) -> None:
        """Each rank takes its part of every tensor, one after the other."""
        rank, ranks = self._tensor.rank(), self._tensor.size()
        for name, parameter in self.model.module.named_parameters():
            for part in self._names.parts(name, parameter):
                part.take(files.tensor(part.name), rank, ranks)


def _checked(setup: TrainerSetup, config: Any) -> ParallelConfig:
    """How the model, of whose `config.json` this is, shall be divided. Raises ConfigError for what cannot be."""
    parallel = setup.trainer.parallel or ParallelConfig()
    only = {
        "trainer.parallel.expert": (parallel.expert, 1),
        "trainer.lora": (setup.trainer.lora, None),
        "trainer.master_weights": (setup.trainer.master_weights, "float32"),
    }
    for key, (value, supported) in only.items():
        if value != supported:
            raise ConfigError(f'{key} = {value!r}, but trainer.kind = "megatron" supports {supported!r} alone')
    if parallel.ranks != distributed.get_world_size():
        raise ConfigError(
            f"trainer.parallel.ranks = {parallel.ranks}, but {distributed.get_world_size()} ranks were started"
        )
    check_division(config, parallel.tensor)
    return parallel


def check_division(config: Any, tensor: int) -> None:
    """Whether so many tensor-parallel ranks can compute a model. Raises ConfigError."""
    with_experts = expert_pattern(config)
    divided = divided_counts(
        "megatron",
        key_heads=config.num_key_value_heads,
        experts=getattr(config, "num_experts", 0),
        inner=0 if all(with_experts) else config.intermediate_size,
        experts_inner=config.moe_intermediate_size if any(with_experts) else 0,
    )
    for what, count in divided.items():
        if count % tensor:
            raise ConfigError(
                f"trainer.parallel.tensor = {tensor} does not divide the model's {what} ({count}); choose one that does"
            )
    if (config.rope_parameters or {}).get("rope_type") == "yarn":
        raise ConfigError(
            'the model sets rope_type = "yarn", which trainer.kind = "megatron" does not compute; use trainer.kind = '
            '"fsdp"'
        )
