"""Sums over the microbatches of a step, which become its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
        for name, value in metrics.items():
            before, now = self._tokens.get(name, 0.0), value.item()
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
