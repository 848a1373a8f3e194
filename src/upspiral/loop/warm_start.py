"""Supervised fine-tuning on demonstrations: which of them make up which optimizer step."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from upspiral.algorithm.sft import sft_credit
from upspiral.config.models import RunConfig
from upspiral.errors import ConfigError
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import Rollout

Shown = tuple[Rollout, TrajectoryGraph]


def successful(shown: Sequence[Shown]) -> list[Shown]:
    """The demonstrations that the verifier accepted. Raises ConfigError when it accepted fewer than half: then the
    oracle, the agent and the verifier do not fit together, and there is nothing good to learn from."""
    good = [(rollout, graph) for rollout, graph in shown if rollout.reward == 1.0]
    if 2 * len(good) < len(shown):
        bad = next(rollout for rollout, _ in shown if rollout.reward != 1.0)
        why = bad.reason or f"the verifier gave {bad.reward} for the answer {bad.answer!r}"
        raise ConfigError(
            f"warm_start: {len(shown) - len(good)} of {len(shown)} demonstrations did not succeed, for example "
            f"{bad.id} ({bad.instruction!r}): {why}. The agent must use the environment's tools and end with the answer"
        )
    return good


def warm_start_steps(
    shown: Sequence[Shown], config: RunConfig, *, lanes: int
) -> Iterator[tuple[float, list[ForestBatch]]]:
    """Learning rate and batches of one optimizer step after another: each epoch in an order of its own, drawn from the
    run's seed; the learning rate falls linearly to a tenth."""
    settings = config.warm_start
    num_steps = settings.epochs * math.ceil(len(shown) / settings.batch_size)
    step = 0
    for epoch in range(settings.epochs):
        order = list(shown)
        random.Random(f"{config.seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), settings.batch_size):
            graphs = [graph for _, graph in order[start : start + settings.batch_size]]
            items = list(zip(graphs, sft_credit(graphs), strict=True))
            batches = pack(
                items,
                tokens_per_microbatch=config.trainer.tokens_per_microbatch,
                lanes=lanes,
                apart=config.trainer.kind != "local",
            )
            yield settings.lr * (1 - 0.9 * step / num_steps), batches
            step += 1
