"""One request being answered, in a task of its own, so that a client that hangs up cannot interrupt a commit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from upspiral.engine.base import Engine, GenerationChunk
from upspiral.errors import DeadlineError, EngineError, RequestError, UpspiralError
from upspiral.gateway.generation import AnswerEvent, Generation
from upspiral.types import SamplingParams

CHUNK_DEADLINE_S = 600.0
"""How long an engine may be silent, without so much as an empty chunk. Generous: an optimizer step or new weights can
come in between."""

CLOSE_DEADLINE_S = 20.0
"""How long an engine may take to let go of a generation. Shorter than what the end of a rollout waits for that."""


class HungUpError(RequestError):
    """The client closed the connection before it had the answer. Nobody is left to read this."""

    status = 499
    code = "client_closed_request"


@dataclass(frozen=True, slots=True, eq=False)
class CallPlan:
    """What to sample: one generation for each entry of `params`, all from the same prompt."""

    name: str
    """For messages: which rollout, which call."""
    prompt_ids: NDArray[np.int32]
    """[T]"""
    params: Sequence[SamplingParams]
    generations: Sequence[Generation]
    reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What the agent is told it used: exactly the tokens that are recorded."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int
    """Prompt tokens that were stored already and not rendered again."""


class Call:
    """Samples, then hands everything over in one piece by calling `on_end(call)`, whatever ended it.

    `on_end` may raise; the error becomes the call's. More than one client may read a call: a retry joins the call that
    it repeats. It is cancelled when the last of them has left.
    """

    def __init__(self, engine: Engine, plan: CallPlan, on_end: Callable[[Call], None]) -> None:
        self.plan = plan
        self._error: UpspiralError | None = None
        self._engine = engine
        self._on_end: Callable[[Call], None] | None = on_end
        self._readers = 1
        self._events: list[AnswerEvent] = []
        self._news = asyncio.Event()
        self._cancelled_by: UpspiralError | None = None
        self._task = asyncio.create_task(self._run(), name=plan.name)
        # Readers must wake even when none of the task's code has run.
        self._task.add_done_callback(lambda _: self._news.set())

    @property
    def error(self) -> UpspiralError | None:
        """Why there is no answer."""
        # A task that is cancelled before its first step runs none of its code.
        return self._stopped_by() if self._task.cancelled() else self._error

    @property
    def delivered(self) -> bool:
        """Whether a client still listened when the last token came."""
        return self.error is None

    @property
    def is_cancelled(self) -> bool:
        """Whether it was told to stop, even if the engine has not let go yet."""
        return self._cancelled_by is not None

    @property
    def task(self) -> asyncio.Task[None]:
        """Done when everything is committed. Never raises."""
        return self._task

    @property
    def usage(self) -> Usage:
        """So far; final when the call is done."""
        sampled = sum(len(generation.token_ids) for generation in self.plan.generations)
        return Usage(len(self.plan.prompt_ids), sampled, self.plan.reused_tokens)

    def join(self) -> Call:
        """Adds a reader."""
        self._readers += 1
        return self

    def leave(self, reason: UpspiralError) -> None:
        """Takes a reader away; the last one to leave an unfinished call cancels it."""
        self._readers -= 1
        if self._readers <= 0:
            self.cancel(reason)

    def cancel(self, reason: UpspiralError) -> None:
        """Stops sampling. What was sampled until now is committed as not delivered. No effect on a finished call."""
        if not self._task.done():
            self._cancelled_by = self._cancelled_by or reason
            self._task.cancel()

    async def events(self) -> AsyncIterator[AnswerEvent]:
        """Events from the first on, as they happen. Raises the call's error, if it has one, after the last."""
        position = 0
        while True:
            # Taken before looking: what happens from here on sets this one.
            news = self._news
            while position < len(self._events):
                yield self._events[position]
                position += 1
            if self._task.done():
                break
            await news.wait()
        if self.error is not None:
            raise self.error

    def _publish(self, event: AnswerEvent) -> None:
        self._events.append(event)
        self._news.set()
        self._news = asyncio.Event()

    async def _run(self) -> None:
        try:
            await self._sample_all()
        except asyncio.CancelledError:
            self._error = self._stopped_by()
        except UpspiralError as error:
            self._error = error
        except Exception as error:  # boundary: whatever an engine does must end as a record, not as a hanging client
            self._error = EngineError(f"{self.plan.name}: the engine failed: {type(error).__name__}: {error}")
        for generation in self.plan.generations:
            generation.cancel()
        self._hand_over()

    def _hand_over(self) -> None:
        """Calls `on_end` and lets go of it: what was cancelled stays in asyncio's tracebacks until the garbage
        collector comes by, and would keep its whole rollout."""
        on_end, self._on_end = self._on_end, None
        assert on_end is not None
        try:
            on_end(self)
        except UpspiralError as error:
            self._error = error

    def _stopped_by(self) -> UpspiralError:
        return self._cancelled_by or HungUpError("the gateway is shutting down")

    async def _sample_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for generation, params in zip(self.plan.generations, self.plan.params, strict=True):
                    group.create_task(self._sample(generation, params))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def _sample(self, generation: Generation, params: SamplingParams) -> None:
        stream = cast(Any, self._engine.generate(self.plan.prompt_ids, params))
        try:
            while not generation.ended:
                event = generation.take(await self._next_chunk(stream))
                if event.tokens or event.pieces or event.end is not None:
                    self._publish(event)
        finally:
            await self._close(stream)

    async def _next_chunk(self, stream: AsyncIterator[GenerationChunk]) -> GenerationChunk:
        try:
            async with asyncio.timeout(CHUNK_DEADLINE_S):
                return await anext(stream)
        except TimeoutError:
            raise DeadlineError(
                f"{self.plan.name} waited {CHUNK_DEADLINE_S:g} s for the engine's next tokens; the engine is stuck"
            ) from None
        except StopAsyncIteration:
            raise EngineError(f"{self.plan.name}: the engine ended without a finish reason") from None

    async def _close(self, stream: Any) -> None:
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await stream.aclose()
        except TimeoutError:
            raise DeadlineError(
                f"{self.plan.name} waited {CLOSE_DEADLINE_S:g} s for the engine to let go of it; the engine is stuck"
            ) from None
