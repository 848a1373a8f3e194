"""What every trainer backend does: forest batches in, new weights out.

A backend of several processes has this interface twice: `Ranks` in the process of the run, and in each of its ranks a
backend of its own, whose methods all ranks call with the same arguments in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.trainer.forest import ForestBatch
from upspiral.weights.publication import Publication, PublisherSettings

StepKind = Literal["policy", "sft"]


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one call of `TrainerBackend.step` did."""

    loss: float
    """Sum of the minibatches' losses; for kind "sft" and one minibatch, nats per token."""
    grad_norm: float
    """Before clipping; the largest over the minibatches. Not finite when a step was skipped."""
    lr: float
    skipped_steps: int
    """Optimizer steps left out because their gradient was not finite; the weights stayed as they were."""
    unique_tokens: int
    """Tokens that went through the model, each once however many branches share it."""
    trained_tokens: int
    seconds: float
    tokens: Mapping[str, float] = field(default_factory=dict)
    """Means over the trained tokens ("max_...": maxima): entropy, and what the loss reports (`algorithm/loss.py`)."""

    def flat(self) -> dict[str, float]:
        """All of it as one flat mapping, for the metrics log."""
        own = asdict(self)
        return own.pop("tokens") | own


@dataclass(frozen=True, slots=True)
class TrainerSetup:
    """What a backend is made from, the same on every rank; it can be pickled."""

    model_folder: Path
    """A Hugging Face folder with weights."""
    dtype: Literal["bfloat16", "float32"]
    device: Literal["auto", "cpu", "cuda"]
    """"auto" is settled by each rank's process, before its backend sees it: who asks may be where no GPU is."""
    trainer: TrainerConfig
    algorithm: AlgorithmConfig
    temperature: float
    """That of the training rollouts; logits are divided by it, as the engine did."""
    seed: int = 0
    threads: int = 1
    """CPU threads of the ranks of a machine together, or of each where their launcher does not count them (there is no
    LOCAL_WORLD_SIZE); 0: one per core."""


class TrainerBackend(Protocol):
    """Owns a model's weights and their optimizer. Methods are called one at a time and block until they are done."""

    def step(
        self, batches: Sequence[ForestBatch], *, kind: StepKind = "policy", lr: float | None = None
    ) -> StepMetrics:
        """Trains on the microbatches of one step: an optimizer step for each minibatch number among them.

        `lr` overrides the configured learning rate and its warm-up. A step whose gradient is not finite is skipped and
        counted. No batches: nothing happens. The metrics are those of all ranks together, on every rank.
        """
        ...

    def publish(self, settings: PublisherSettings, version: int) -> Publication:
        """Writes the weights as they are, by Hugging Face's names, as the publication of a version. The first one of a
        process is whole."""
        ...

    def rest(self) -> None:
        """Gives back the memory that no weight or moment needs: until the next call, others compute on its devices."""
        ...

    def save(self, folder: Path) -> None:
        """Writes everything that the next step depends on into an empty folder."""
        ...

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, also with another number of ranks where the backend says so. StoreError when
        another model or another kind of backend wrote it."""
        ...

    def forget_moments(self) -> None:
        """Starts the optimizer anew on the weights as they are, as between warm start and RL."""
        ...

    def close(self) -> None:
        """Frees what the backend holds; it is not used afterwards."""
        ...
