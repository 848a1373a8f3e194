"""One rank of FSDP2: its part of every weight, gathered layer by layer for each pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from upspiral.trainer.attention import ForestPass, forest_attention_in
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.decoder import compute_by_modules
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.fsdp.experts import DividedExperts
from upspiral.trainer.fsdp.layout import Layout, check, divide, head_norms
from upspiral.trainer.fsdp.optimizer import ShardedAdamW, global_norm, gradient_of
from upspiral.trainer.fsdp.state import load_state, save_state
from upspiral.trainer.logprob import target_logprobs
from upspiral.trainer.rank_backend import RankBackend, clip_scale
from upspiral.trainer.routes import replayed_routes_in
from upspiral.weights.model_files import ModelFiles
from upspiral.weights.publication import Publication, PublisherSettings

_EXPERTS_NAME = "upspiral_divided"


class FsdpBackend(RankBackend):
    """See `TrainerBackend`. A checkpoint can be loaded with another number of ranks, however they divide the model."""

    def __init__(self, setup: TrainerSetup) -> None:
        """Raises ConfigError, naming the key, for what this backend does not do."""
        files = ModelFiles(setup.model_folder)
        model: Any = files.skeleton()
        self._layout = Layout.of(check(setup, files.config, distributed.get_world_size()), setup.device)
        compute_by_modules(model)
        self._model = model
        self._policy: Any = _Policy(model)
        divide(self._policy, model, files, self._layout, setup)
        if self._layout.experts is not None:
            group = self._layout.experts.get_group()
            ALL_EXPERTS_FUNCTIONS.register(_EXPERTS_NAME, DividedExperts(group, dispatches=self._layout.dispatches))
            model.set_experts_implementation(_EXPERTS_NAME)
        self._parameters: dict[str, DTensor] = dict(model.named_parameters())
        self._optimizer = ShardedAdamW(list(self._parameters.values()), setup.trainer)
        super().__init__(setup, self._layout.data.get_group(), alike=self._layout.dispatches)

    def publish(self, settings: PublisherSettings, version: int) -> Publication:
        return self._publish_together(self._whole(), self._model.config, settings, version)

    def save(self, folder: Path) -> None:
        save_state(folder, self._parameters, self._optimizer, self._policy_steps)

    def load(self, folder: Path) -> None:
        self._policy_steps = load_state(folder, self._parameters, self._optimizer)

    def forget_moments(self) -> None:
        self._optimizer.forget_moments()

    def close(self) -> None:
        self._layout.close()

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        """All weights in the model's precision, one at a time on every rank."""
        dtype = getattr(torch, self._setup.dtype)
        for name, parameter in self._parameters.items():
            rounded: Any = parameter.detach().to(dtype)
            yield name, rounded.full_tensor()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(forest_attention_in(self._model))
            stack.enter_context(replayed_routes_in(self._model))
            # What is gathered for passes without a gradient would stay, and grow old.
            stack.callback(self._policy.reshard)
            yield

    def _logprobs(self, batch: ForestBatch, forest: ForestPass, temperature: float) -> tuple[Tensor, Tensor]:
        return self._policy(_Pass(batch, forest, temperature))

    def _update(self, lr: float) -> float:
        if self._layout.tensor is not None:
            for norm in head_norms(self._model):
                distributed.all_reduce(gradient_of(norm), group=self._layout.tensor.get_group())
        norm = global_norm(list(self._parameters.values()))
        if math.isfinite(norm):
            self._optimizer.step(clip_scale(norm, self._setup.trainer.max_grad_norm), lr)
        for parameter in self._parameters.values():
            parameter.grad = None
        return norm


class _Pass:
    """Not a dataclass: FSDP would look into one for tensors."""

    def __init__(self, batch: ForestBatch, forest: ForestPass, temperature: float) -> None:
        self.batch, self.forest, self.temperature = batch, forest, temperature


class _Policy(nn.Module):
    """What FSDP calls: embedding, last norm and output layer are gathered for as long as it computes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, one: _Pass) -> tuple[Tensor, Tensor]:
        return target_logprobs(self.model, one.batch, temperature=one.temperature, forest=one.forest)
