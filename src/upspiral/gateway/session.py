"""One live rollout: its graph, its key and its limits."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from upspiral.engine.base import Engine
from upspiral.errors import (
    ContextLengthError,
    DeadlineError,
    EngineError,
    RequestError,
    SealedRolloutError,
    UpspiralError,
)
from upspiral.gateway.call import Call, CallPlan
from upspiral.gateway.generation import Generation
from upspiral.gateway.hints import NO_HINTS, Hints
from upspiral.gateway.history import History, Prompt
from upspiral.gateway.metrics import GatewayMetrics
from upspiral.gateway.request import AnswerRequest, SessionPolicy
from upspiral.rendering.answer import ReadingRules
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Node, Rollout

SEAL_DEADLINE_S = 30.0
"""How long the engine may take to let go of cancelled generations."""


class MaxCallsError(RequestError):
    """The rollout has used up its model calls."""

    code = "max_calls"


@dataclass(frozen=True, slots=True)
class SealedRollout:
    """How a rollout ended, as far as the gateway knows."""

    calls: int
    """Requests that reached the engine."""
    truncated: str | None
    """The limit that its last request ran into: "max_calls" or "context_length_exceeded"."""
    failed: str | None
    """What broke in the engine or the store. Infrastructure: the rollout is to be masked (DESIGN law 6)."""


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """What the sessions of a gateway share."""

    renderer: Renderer
    engine: Engine
    store: TrajectoryStore
    metrics: GatewayMetrics


class Session:
    """Belongs to one event loop. Looking up and committing do not await, so requests of one rollout cannot come between
    each other; they do sample at the same time."""

    def __init__(self, room: Room, rollout: Rollout, policy: SessionPolicy) -> None:
        self.rollout = rollout
        self.key = f"sk-up-{secrets.token_urlsafe(24)}"
        self._room = room
        self._policy = policy
        self._history = History(rollout.id, room.renderer)
        self._in_flight: set[Call] = set()
        self._calls = 0
        self._sealed = False
        self._truncated: str | None = None
        self._failed: str | None = None

    @property
    def failed(self) -> str | None:
        """What broke in the engine or the store."""
        return self._failed

    @property
    def truncated(self) -> str | None:
        """The limit that the last request ran into."""
        return self._truncated

    @property
    def graph(self) -> TrajectoryGraph:
        return self._history.graph

    def begin(self, request: AnswerRequest, hints: Hints = NO_HINTS) -> Call:
        """Starts to answer. Raises SealedRolloutError, MaxCallsError, ContextLengthError, TemplateError or EngineError
        before anything is sampled."""
        self._check_open()
        prompt = self._history.prompt(request.messages, request.tools)
        room = self._check_context(prompt)
        self._calls += 1
        self._room.metrics.prompt(len(prompt.token_ids), prompt.reused_tokens)
        call = Call(
            self._room.engine,
            self._plan(request, prompt, room),
            lambda call: self._end(call, prompt),
        )
        self._in_flight.add(call)
        call.task.add_done_callback(lambda _: self._in_flight.discard(call))
        return call

    def count(self, request: AnswerRequest) -> int:
        """Tokens of the prompt that `begin` would send. Changes nothing; raises TemplateError."""
        return len(self._history.prompt(request.messages, request.tools).token_ids)

    async def seal(self) -> SealedRollout:
        """Refuses new requests, cancels those in flight and waits until what they sampled is committed. Afterwards
        nothing is recorded. Raises DeadlineError when the engine does not let go."""
        self._sealed = True
        calls = list(self._in_flight)
        for call in calls:
            call.cancel(SealedRolloutError(f"rollout {self.rollout.id} ended while this request was answered"))
        if calls:
            _, stuck = await asyncio.wait([call.task for call in calls], timeout=SEAL_DEADLINE_S)
            if stuck:
                raise DeadlineError(
                    f"sealing rollout {self.rollout.id} waited {SEAL_DEADLINE_S:g} s for the engine to cancel "
                    f"{len(stuck)} generations"
                )
        return SealedRollout(self._calls, self._truncated, self._failed)

    def _check_open(self) -> None:
        if self._sealed:
            raise SealedRolloutError(f"rollout {self.rollout.id} has ended; nothing more is answered or recorded")
        if self._failed is not None:
            raise EngineError(f"rollout {self.rollout.id} cannot go on: {self._failed}")
        limit = self._policy.max_calls
        if limit is not None and self._calls >= limit:
            self._truncated = MaxCallsError.code
            raise MaxCallsError(f"rollout {self.rollout.id} has used its {limit} model calls; stop the agent here")

    def _check_context(self, prompt: Prompt) -> int:
        """Tokens left for an answer."""
        limit, length = self._room.engine.context_length, len(prompt.token_ids)
        if length >= limit:
            self._truncated = ContextLengthError.code
            raise ContextLengthError(
                f"the prompt has {length} tokens and the model's context holds {limit}, at least one of them for the "
                "answer; shorten the history"
            )
        return limit - length

    def _plan(self, request: AnswerRequest, prompt: Prompt, room: int) -> CallPlan:
        renderer, call = self._room.renderer, self._calls
        rules = ReadingRules(
            tool_calls=bool(request.tools) and request.tool_choice.mode != "none",
            parallel_tool_calls=request.parallel_tool_calls,
            stop_strings=request.stop_strings,
        )
        params = [
            self._policy.sampling(request, room=room, stop_token_ids=renderer.stop_token_ids, call=call, answer=index)
            for index in range(request.answers)
        ]
        generations = [Generation(index, renderer, rules) for index in range(request.answers)]
        return CallPlan(f"call {call} of rollout {self.rollout.id}", prompt.token_ids.tolist(), params, generations)

    def _end(self, call: Call, prompt: Prompt) -> None:
        """Commits what a call sampled: the new context and its answers in one transaction."""
        if isinstance(call.error, EngineError | DeadlineError):
            self._failed = str(call.error)
        elif call.error is None:
            self._truncated = None
        generations = [generation for generation in call.plan.generations if generation.token_ids]
        if not generations:
            return
        try:
            nodes = self._commit(generations, prompt, delivered=call.delivered)
        except UpspiralError as error:
            self._failed = str(error)
            raise
        self._room.metrics.committed(nodes, [error for g in generations for error in g.answer().errors])

    def _commit(self, generations: list[Generation], prompt: Prompt, *, delivered: bool) -> list[Node]:
        parent, nodes = self._history.add_context(prompt)
        for generation in generations:
            message = generation.answer().message
            try:
                tokens = generation.tokens()
                nodes.append(self._history.add_answer(parent, tokens, message, prompt, delivered=delivered))
            except ValueError as error:
                raise EngineError(f"rollout {self.rollout.id}: the engine's tokens are unusable: {error}") from error
        self._room.store.commit(self.rollout.id, nodes)
        return nodes
