"""What a rank of any backend does in a step: its batches in rounds with the others, one update for each minibatch.

Backends differ in how a pass reaches the weights and in how the weights are updated: they fill in the rest.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, distributed

from upspiral.algorithm.loss import Loss, PolicyLoss, SftLoss
from upspiral.trainer.attention import ForestPass
from upspiral.trainer.base import StepKind, StepMetrics, TrainerSetup
from upspiral.trainer.forest import ForestBatch, plain_path
from upspiral.trainer.optimizer import learning_rate
from upspiral.trainer.rounds import Turn, turns
from upspiral.trainer.tally import Tally
from upspiral.trainer.terms import token_terms
from upspiral.weights.cpu import give_back_freed_memory
from upspiral.weights.names import hugging_face_tensors
from upspiral.weights.probe import probe_tokens
from upspiral.weights.publication import Probe, Publication, PublisherSettings
from upspiral.weights.publisher import Publisher


class RankBackend(ABC):
    """`TrainerBackend.step` for ranks that have different lanes of the same batches.

    Token weights have their denominators already, so the gradients of ranks must be added, never averaged.
    """

    def __init__(self, setup: TrainerSetup, data_group: Any, *, alike: bool = False) -> None:
        """`data_group`: the process group of the ranks that share the batches among them; this rank's place in it says
        which are its own. `alike`: see `turns`."""
        self._setup, self._group, self._alike = setup, data_group, alike
        self._losses: dict[str, Loss] = {"policy": PolicyLoss.from_config(setup.algorithm), "sft": SftLoss()}
        self._temperatures = {"policy": setup.temperature, "sft": 1.0}
        self._policy_steps = 0
        self._publisher: Publisher | None = None

    def step(
        self, batches: Sequence[ForestBatch], *, kind: StepKind = "policy", lr: float | None = None
    ) -> StepMetrics:
        """See `TrainerBackend`."""
        started = time.monotonic()
        rate = learning_rate(self._setup.trainer, self._policy_steps) if lr is None else lr
        tally = Tally()
        with self._computing():
            for minibatch, old in self._with_old_logprobs(batches, kind):
                self._accumulate(minibatch, old, kind, tally)
                tally.norms.append(self._update(rate))
        tally.add_up(self._of_all_ranks(tally.sums))
        self._policy_steps += kind == "policy" and bool(batches)
        return tally.metrics(rate, time.monotonic() - started)

    def rest(self) -> None:
        """See `TrainerBackend`."""
        give_back_freed_memory()

    @abstractmethod
    def _logprobs(self, batch: ForestBatch, forest: ForestPass, temperature: float) -> tuple[Tensor, Tensor]:
        """See `target_logprobs`. What it returns leads back through the whole model, also where it is empty."""

    @abstractmethod
    def _update(self, lr: float) -> float:
        """One update by the gradients since the last. Returns their norm over the whole model, the same on all ranks;
        when it is not finite, the weights stay and the gradients are dropped."""

    def _publish_together(
        self, weights: Iterable[tuple[str, Tensor]], config: Any, settings: PublisherSettings, version: int
    ) -> Publication:
        """`weights`: the module's parameters by name, gathered one by one by all ranks; the first one writes them.
        `config`: that of the module."""
        if self._publisher is None:
            self._publisher = Publisher(self._setup.model_folder)
        probe = self._measured_probe(config.vocab_size)
        tensors = hugging_face_tensors(weights, tied=config.tie_word_embeddings)
        published: list[Publication | None] = [None]
        if distributed.get_rank() == 0:
            published[0] = self._publisher.publish(tensors, version, settings, probe=probe)
        else:
            deque(tensors, maxlen=0)
        distributed.broadcast_object_list(published, src=0)
        assert published[0] is not None
        return published[0]

    @torch.no_grad()
    def _measured_probe(self, vocabulary: int) -> Probe:
        """See `measured_probe`. All ranks call it together, and all have it."""
        token_ids = probe_tokens(vocabulary)
        batch = plain_path(token_ids)
        with self._computing():
            logprobs, _ = self._logprobs(batch, ForestPass(batch), 1.0)
        return Probe(token_ids, logprobs.tolist())

    def _backward(self, turn: Turn) -> None:
        turn.lane.end(turn.work)

    def _computing(self) -> AbstractContextManager[None]:
        """What holds around the passes of a step."""
        return nullcontext()

    def _accumulate(
        self, minibatch: Sequence[ForestBatch], old_logprobs: Mapping[int, Tensor], kind: str, tally: Tally
    ) -> None:
        for batch in minibatch:
            tally.count(batch)
        for turn in self._turns(minibatch):
            if turn.kind == "backward":
                self._backward(turn)
                continue
            logprobs, entropy = self._logprobs(turn.batch, turn.lane.begin(turn.work), self._temperatures[kind])
            loss = logprobs.sum()  # of no targets: zero, with a way back into every layer
            if turn.batch.num_targets:
                terms = token_terms(turn.batch, logprobs, old_logprobs.get(id(turn.batch)))
                loss, metrics = self._losses[kind](terms)
                tally.add(loss.item(), {"entropy": entropy.sum(), **metrics})
            turn.lane.keep_loss(turn.work, loss)

    def _with_old_logprobs(
        self, batches: Sequence[ForestBatch], kind: str
    ) -> Iterator[tuple[list[ForestBatch], dict[int, Tensor]]]:
        """As the local trainer does it: with a single minibatch p_old is p_theta; with more, it is taken before the
        first update."""
        minibatches = [list(part) for _, part in groupby(batches, key=lambda batch: batch.minibatch)]
        old: dict[int, Tensor] = {}
        if len(minibatches) > 1 and kind == "policy":
            for part in minibatches:
                old |= self._old_logprobs(part, kind)
        for part in minibatches:
            yield part, old

    @torch.no_grad()
    def _old_logprobs(self, minibatch: Sequence[ForestBatch], kind: str) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for turn in self._turns(minibatch):
            if turn.kind == "forward":
                forest = turn.lane.begin(turn.work)
                found[id(turn.batch)], _ = self._logprobs(turn.batch, forest, self._temperatures[kind])
            else:
                turn.lane.end(turn.work)  # without a gradient this only forgets the pass
        return found

    def _turns(self, minibatch: Sequence[ForestBatch]) -> Iterator[Turn]:
        place, places = distributed.get_rank(self._group), distributed.get_world_size(self._group)
        recompute = self._setup.trainer.activation_checkpointing
        return turns(minibatch, place, places, recompute=recompute, alike=self._alike)

    def _of_all_ranks(self, own: Any) -> list[Any]:
        """In the order of their places."""
        found: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(found, own, group=self._group)
        return found


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients are multiplied with for a global norm of at most `max_norm`."""
    return max_norm / norm if math.isfinite(norm) and norm > max_norm else 1.0
