"""The engine protocol: token ids in; token ids, log-probabilities and policy versions out.

An engine knows no messages and no text. Rendering and parsing belong to the gateway.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from upspiral.types import FinishReason, SamplingParams
from upspiral.weights.publication import Publication

UNPUBLISHED_VERSION = -1
"""Of an engine that has the model's folder and to which nothing was published: the first publication is version 0."""
TokenIds = Sequence[int] | NDArray[np.int32]
"""[T] the ids of a prompt."""


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """What one or more decoding steps produced. The lists have equal length, `kept_ids` where it was asked for.

    Only the last chunk of a generation has a `finish_reason`; it may carry no tokens. With reason "stop" the stop
    token is the last sampled token: it was sampled, so it is recorded and trained. One with nothing in it says that
    the engine works on it: what was sampled cannot be told yet.
    """

    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    """Natural log, under the distribution that was sampled from (after temperature and filters; at temperature 0 under
    the model's plain softmax)."""
    versions: Sequence[int] = ()
    finish_reason: FinishReason | None = None
    routes: NDArray[np.int16] | None = None
    """[tokens, layers with experts, experts of a token] which experts computed the token before each of these. None:
    the engine does not say."""
    prompt_routes: NDArray[np.int16] | None = None
    """On the first chunk with tokens, if the engine says: [T - 1, ...] which experts computed the prompt's tokens but
    the last."""
    kept_ids: Sequence[NDArray[np.int32] | None] = ()
    """With `SamplingParams.list_kept`, of each token the ids that top-p, top-k and min-p left, ascending: its
    log-probability is the model's, renormalised over them. None where no filter was on, as at temperature 0."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics; counters only grow."""

    running: int = 0
    waiting: int = 0
    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    """Prompt tokens that were computed."""
    reused_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    extra: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Any source of sampled tokens. All methods are called from one asyncio event loop."""

    @property
    def context_length(self) -> int:
        """The most tokens that prompt plus completion may have."""
        ...

    @property
    def version(self) -> int:
        """The policy version that the next sampled token will carry."""
        ...

    def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        """Samples a completion. Closing the iterator (`aclose`, or cancelling the task that reads it) cancels the
        generation. Raises ContextLengthError when the prompt leaves no room for one token, EngineError when
        inference fails."""
        ...

    def stats(self) -> EngineStats: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class UpdatableEngine(Engine, Protocol):
    """An engine whose weights are published to it, as it does not share the trainer's memory."""

    async def update_weights(self, publication: Publication) -> None:
        """Adopts the weights of a publication: every token that is sampled afterwards carries its version, and no
        keys or values of earlier weights are reused for new prompts. Generations under way lose no token: they go on,
        each token with the version that sampled it. The same version again does nothing, unless the engine sleeps:
        this is what wakes it.

        Returns when the engine answers with the new weights, which it has checked. Raises StaleBaseError when the
        publication is a difference that the engine cannot use, be it to a version that it does not have, damaged or
        not what its probe says (publish it whole), and EngineError when the engine cannot adopt it."""
        ...

    async def sleep(self) -> None:
        """Gives up the memory of weights and cache, for a trainer on the same device, until `update_weights`. So long,
        generations, old and new, wait as in a pause; those under way are then computed again from their tokens.
        Sleeping twice does nothing. Raises EngineError when the memory may not be free."""
        ...

    async def pause(self) -> None:
        """Holds tokens back until `resume`; generations under way wait and go on afterwards. Pauses nest."""
        ...

    def resume(self) -> None:
        """Takes one `pause` back."""
        ...
