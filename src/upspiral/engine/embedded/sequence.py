"""One request on its way through the embedded engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from upspiral.engine.base import GenerationChunk
from upspiral.types import FinishReason, SamplingParams

Delivery = GenerationChunk | Exception


@dataclass(slots=True, eq=False)
class Sequence:
    """Waits without a slot, then prefills, then decodes. Only the engine thread touches it, except where noted."""

    prompt_ids: NDArray[np.int32]
    """What is to be computed before the next token is sampled: the prompt, and what was sampled before a start over."""
    params: SamplingParams
    max_tokens: int
    """`params.max_tokens`, or fewer where the context ends first."""
    random: np.random.Generator
    """Its own, so that what it draws does not depend on what else is in the batch."""
    deliveries: asyncio.Queue[Delivery]
    """Read by the event loop."""
    slot: int = -1
    sampled: int = 0
    cancelled: bool = False
    """Set by the event loop; the engine thread looks at the start of a step."""
    _stop_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self._stop_token_ids = frozenset(self.params.stop_token_ids)

    def accept(self, token_id: int) -> FinishReason | None:
        """Counts a sampled token and says whether it ends the completion."""
        self.sampled += 1
        if token_id in self._stop_token_ids:
            return "stop"
        return "length" if self.sampled >= self.max_tokens else None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. start + count of a sequence's prompt, computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def completes_prompt(self) -> bool:
        return self.start + self.count == len(self.sequence.prompt_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes: one token of each decoding sequence and some chunks of prompts."""

    decoding: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]

    def __bool__(self) -> bool:
        return bool(self.decoding or self.chunks)

    @property
    def sampling(self) -> tuple[Sequence, ...]:
        """Which sequences get a token from this step, in the order of the rows of the logits."""
        return self.decoding + tuple(chunk.sequence for chunk in self.chunks if chunk.completes_prompt)
