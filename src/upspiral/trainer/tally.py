"""Sums over the microbatches of a step, which become its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from upspiral.trainer.base import StepMetrics
from upspiral.trainer.forest import ForestBatch


class Tally:
    """Sums over the microbatches of a step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self._loss = 0.0
        self._unique = self._trained = 0
        self._tokens: dict[str, float] = {}

    def count(self, batch: ForestBatch) -> None:
        self._unique += batch.num_tokens
        self._trained += batch.num_targets

    def add(self, loss: float, metrics: Mapping[str, Tensor]) -> None:
        self._loss += loss
        self._add_tokens({name: value.item() for name, value in metrics.items()})

    @property
    def sums(self) -> tuple[float, dict[str, float]]:
        """Loss and token metrics, for `add_up`."""
        return self._loss, self._tokens

    def add_up(self, of_ranks: Sequence[tuple[float, Mapping[str, float]]]) -> None:
        """Takes the sums of all ranks in place of its own; what was counted is of all ranks already."""
        self._loss, self._tokens = math.fsum(loss for loss, _ in of_ranks), {}
        for _, tokens in of_ranks:
            self._add_tokens(tokens)

    def _add_tokens(self, tokens: Mapping[str, float]) -> None:
        for name, now in tokens.items():
            before = self._tokens.get(name, 0.0)
            self._tokens[name] = max(before, now) if name.startswith("max_") else before + now

    def metrics(self, lr: float, seconds: float) -> StepMetrics:
        return StepMetrics(
            loss=self._loss,
            grad_norm=max(self.norms, default=0.0),
            lr=lr,
            skipped_steps=sum(not math.isfinite(norm) for norm in self.norms),
            unique_tokens=self._unique,
            trained_tokens=self._trained,
            seconds=seconds,
            tokens={
                name: value if name.startswith("max_") else value / self._trained
                for name, value in self._tokens.items()
            },
        )
