"""The trainer of one process and one device: forest batches in, new weights in place out.

Reproducible bit for bit: sums run in a fixed order for a fixed number of threads, and random numbers, where
`trainer.lora` and `trainer.master_weights` want some, start from torch's seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upspiral.algorithm.loss import Loss, PolicyLoss, SftLoss
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.errors import StoreError
from upspiral.trainer.attention import ForestPass, forest_attention_in
from upspiral.trainer.base import StepKind, StepMetrics, TrainerSetup
from upspiral.trainer.decoder import prepare
from upspiral.trainer.depth_first import Lane, Work, lanes_of
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.gradients import GradientSums, Source, whole_weights
from upspiral.trainer.lanes import Lanes
from upspiral.trainer.logprob import target_logprobs
from upspiral.trainer.lora import factors_behind
from upspiral.trainer.optimizer import MasterAdamW, ParameterOptimizer, learning_rate
from upspiral.trainer.rounding import RoundingAdamW
from upspiral.trainer.routes import replayed_routes_in
from upspiral.trainer.tally import Tally
from upspiral.trainer.terms import token_terms
from upspiral.weights.adapter import Adapter
from upspiral.weights.cpu import give_back_freed_memory
from upspiral.weights.experts import exact_experts_in
from upspiral.weights.names import hugging_face_tensors
from upspiral.weights.probe import measured_probe
from upspiral.weights.publication import Publication, PublisherSettings
from upspiral.weights.publisher import Publisher

_STATE = "state.pt"
_OPTIMIZERS: Mapping[str, type[ParameterOptimizer]] = {"float32": MasterAdamW, "none": RoundingAdamW}
"""By `trainer.master_weights`."""


class LocalTrainer:
    """Owns the optimizer of a model that it shares with the engine. `step` must not run while the engine samples."""

    def __init__(
        self,
        model: Any,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        temperature: float,
        lanes: int = 1,
        exact: bool = False,
    ) -> None:
        """`model`: a causal language model of transformers, on its device, with trainable parameters.
        `temperature`: that of the training rollouts; logits are divided by it, as the engine did.
        `lanes`: microbatches computed side by side, on a CPU thread each. `exact`: log-probabilities to the same bits
        as those of the embedded engine in its exact mode.
        Raises ModelError when nothing in the model is trainable, ConfigError when it lacks a layer to be adapted."""
        prepare(model)
        self.adapter = Adapter(model, config.lora) if config.lora else None
        # No dropout: the policy that is trained is the one that sampled.
        self._lanes = Lanes(model.eval(), lanes)
        self._config = config
        self._temperature = temperature
        self._exact = exact
        self._losses: dict[str, Loss] = {"policy": PolicyLoss.from_config(algorithm), "sft": SftLoss()}
        self._temperatures = {"policy": temperature, "sft": 1.0}
        self._sums = GradientSums([self._sources_in(lane) for lane in self._lanes.models])
        self._optimizer = _OPTIMIZERS[config.master_weights](self._trained(model), config)
        self._policy_steps = 0
        self._publisher: Publisher | None = None

    @classmethod
    def of(cls, model: Any, setup: TrainerSetup, *, lanes: int, exact: bool) -> LocalTrainer:
        """Of a model that is loaded already, and can be published."""
        temperature = setup.temperature
        trainer = cls(model, setup.trainer, setup.algorithm, temperature=temperature, lanes=lanes, exact=exact)
        trainer._publisher = Publisher(setup.model_folder)
        return trainer

    def step(
        self, batches: Sequence[ForestBatch], *, kind: StepKind = "policy", lr: float | None = None
    ) -> StepMetrics:
        """Trains on the microbatches of one step: an optimizer step for each minibatch number among them.

        `lr` overrides the configured learning rate and its warm-up. A step whose gradient is not finite is skipped and
        counted. No batches: nothing happens.
        """
        started = time.monotonic()
        rate = learning_rate(self._config, self._policy_steps) if lr is None else lr
        tally = Tally()
        with self._forest_attention():
            for minibatch, old in self._with_old_logprobs(batches, kind):
                self._accumulate(minibatch, old, kind, tally)
                self._update(rate, tally)
        self._policy_steps += kind == "policy" and bool(batches)
        return tally.metrics(rate, time.monotonic() - started)

    def gradients(self, batches: Sequence[ForestBatch], kind: StepKind = "policy") -> StepMetrics:
        """Computes the gradients of one minibatch and drops them: what a step costs without its update."""
        started = time.monotonic()
        tally = Tally()
        with self._forest_attention():
            self._accumulate(batches, {}, kind, tally)
        self._sums.drop()
        return tally.metrics(0.0, time.monotonic() - started)

    def forget_moments(self) -> None:
        """Starts the optimizer anew on the weights as they are, as between warm start and RL."""
        self._optimizer.forget_moments()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, trained weights included; of a model with an adapter the factors
        alone. Live tensors: save before the next step."""
        state = {"optimizer": self._optimizer.state_dict(), "policy_steps": self._policy_steps}
        return state if self.adapter is None else state | {"base": self.adapter.base_sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the weights in place and the optimizer. StoreError when another model wrote the state."""
        self._optimizer.load_state_dict(state["optimizer"])
        if self.adapter is not None and state.get("base") != self.adapter.base_sums:
            raise StoreError("the checkpoint's factors belong to other base weights; resume with theirs")
        self._merge()
        self._policy_steps = int(state["policy_steps"])

    def publish(self, settings: PublisherSettings, version: int) -> Publication:
        """See TrainerBackend. Engines may go on meanwhile; it reads the weights and takes no turn of theirs."""
        assert self._publisher is not None, "made by `of`"
        model = self._lanes.models[0]
        tensors = hugging_face_tensors(model.named_parameters(), tied=model.config.tie_word_embeddings)
        return self._publisher.publish(tensors, version, settings, probe=measured_probe(model))

    def rest(self) -> None:
        give_back_freed_memory()

    def save(self, folder: Path) -> None:
        torch.save(self.state_dict(), folder / _STATE)

    def load(self, folder: Path) -> None:
        """Weights in place, so that an engine which shares them has them, too."""
        if not (folder / _STATE).is_file():
            raise StoreError(f'{folder} has no {_STATE}: it is no checkpoint of trainer.kind = "local"')
        self.load_state_dict(torch.load(folder / _STATE, map_location="cpu", weights_only=True))

    def close(self) -> None:
        """Nothing outlives the trainer's own objects."""

    def _trained(self, model: Any) -> list[Tensor]:
        """What the optimizer updates."""
        if self.adapter is not None:
            return self.adapter.factors
        return [source.weight for source in whole_weights(model)]

    def _sources_in(self, lane: Any) -> list[Source]:
        return whole_weights(lane) if self.adapter is None else factors_behind(lane, self.adapter)

    def _merge(self) -> None:
        if self.adapter is not None:
            self.adapter.merge()

    @contextmanager
    def _forest_attention(self) -> Iterator[None]:
        with ExitStack() as stack:
            for model in self._lanes.models:
                stack.enter_context(forest_attention_in(model))
                stack.enter_context(replayed_routes_in(model))
                if self._exact:
                    stack.enter_context(exact_experts_in(model))
            yield

    def _with_old_logprobs(
        self, batches: Sequence[ForestBatch], kind: str
    ) -> Iterator[tuple[list[ForestBatch], dict[int, Tensor]]]:
        """The minibatches, each with log p_old by the batch's `id()`. With a single minibatch p_old is p_theta and need
        not be computed beforehand; with more, it is taken before the first update."""
        minibatches = [list(part) for _, part in groupby(batches, key=lambda batch: batch.minibatch)]
        old: dict[int, Tensor] = {}
        if len(minibatches) > 1 and kind == "policy":
            for lane in (lane for part in minibatches for lane in lanes_of(part, exact=self._exact)):
                old |= self._logprobs_of(lane, kind)
        for part in minibatches:
            yield part, old

    @torch.no_grad()
    def _logprobs_of(self, lane: Lane, kind: str) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for work in lane.remaining:
            if work.kind != "backward":
                batch = lane.batches[work.batch]
                found[id(batch)], _ = self._logprobs(self._lanes.models[0], batch, kind, lane.begin(work))
            if work.kind != "forward":
                lane.end(work)
        return found

    def _accumulate(
        self, minibatch: Sequence[ForestBatch], old_logprobs: Mapping[int, Tensor], kind: str, tally: Tally
    ) -> None:
        """Gradients of all microbatches, those of the lanes at the same time, summed in their order."""
        lanes = lanes_of(minibatch, exact=self._exact, recompute=self._config.activation_checkpointing)
        for batch in minibatch:
            tally.count(batch)
        # Further lanes than there are models wait for the one before them on theirs.
        numbered = [(number % len(self._lanes), lane) for number, lane in enumerate(lanes)]
        while busy := {number: lane for number, lane in reversed(numbered) if lane.remaining}:
            items = {number: (busy[number], busy[number].remaining.popleft()) for number in sorted(busy)}
            for outcome in self._round(items, old_logprobs, kind):
                tally.add(*outcome)

    def _round(
        self, items: Mapping[int, tuple[Lane, Work]], old_logprobs: Mapping[int, Tensor], kind: str
    ) -> list[tuple[float, Mapping[str, Tensor]]]:
        """Loss and metrics of one piece of work for each lane's model, by its number."""
        backward = [number for number, (_, work) in items.items() if work.kind != "forward"]
        with self._sums.collected(backward) as turns:

            def compute(model: Any, number: int) -> tuple[float, Mapping[str, Tensor]]:
                with turns.taken_by(number):
                    return self._compute(model, *items[number], old_logprobs, kind)

            return self._lanes.run(compute, list(items))

    def _compute(
        self, model: Any, lane: Lane, work: Work, old_logprobs: Mapping[int, Tensor], kind: str
    ) -> tuple[float, Mapping[str, Tensor]]:
        outcome: tuple[float, Mapping[str, Tensor]] = 0.0, {}
        if work.kind != "backward":
            batch = lane.batches[work.batch]
            logprobs, entropy = self._logprobs(model, batch, kind, lane.begin(work))
            if batch.num_targets:
                loss, metrics = self._losses[kind](token_terms(batch, logprobs, old_logprobs.get(id(batch))))
                lane.keep_loss(work, loss)
                outcome = loss.item(), {"entropy": entropy.sum(), **metrics}
        if work.kind != "forward":
            lane.end(work)
        return outcome

    def _update(self, lr: float, tally: Tally) -> None:
        norm = self._sums.clip(self._config.max_grad_norm)
        tally.norms.append(norm)
        if math.isfinite(norm):
            self._optimizer.step(self._sums, lr)
            self._merge()
        else:
            self._sums.drop()

    def _logprobs(self, model: Any, batch: ForestBatch, kind: str, forest: ForestPass) -> tuple[Tensor, Tensor]:
        return target_logprobs(model, batch, temperature=self._temperatures[kind], forest=forest)
