"""One live rollout: its graph, its key and its limits."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upspiral.engine.base import Engine
from upspiral.errors import (
    ContextLengthError,
    DeadlineError,
    EngineError,
    LedgerError,
    RequestError,
    SealedRolloutError,
    UpspiralError,
)
from upspiral.gateway.call import Call, CallPlan
from upspiral.gateway.generation import Generation
from upspiral.gateway.hints import NO_HINTS, Hints
from upspiral.gateway.history import Answered, History, Prompt
from upspiral.gateway.lineage import Lineage
from upspiral.gateway.metrics import GatewayMetrics
from upspiral.gateway.request import AnswerRequest, SessionPolicy
from upspiral.rendering.answer import ReadingRules
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Edge, Node, Rollout

SEAL_DEADLINE_S = 30.0
"""How long the engine may take to let go of cancelled generations."""
REMEMBERED_CALLS = 4
"""So many of the newest complete calls of a rollout can be sent again to a client that retries, beside all that are
still being answered."""


class MaxCallsError(RequestError):
    """The rollout has used up its model calls."""

    code = "max_calls"


@dataclass(frozen=True, slots=True)
class SealedRollout:
    """How a rollout ended, as far as the gateway knows."""

    calls: int
    """Requests that reached the engine, without side calls."""
    truncated: str | None
    """The limit that its last request ran into, side calls left out: "max_calls" or "context_length_exceeded"."""
    failed: str | None
    """What broke in the engine or the store. Infrastructure: the rollout is to be masked (DESIGN law 6)."""


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """What the sessions of a gateway share."""

    renderer: Renderer
    engine: Engine
    store: TrajectoryStore
    metrics: GatewayMetrics


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What a call is recorded with, once it ends."""

    prompt: Prompt
    hints: Hints
    auxiliary: str


class Session:
    """Belongs to one event loop. Looking up and committing do not await, so requests of one rollout cannot come between
    each other; they do sample at the same time."""

    def __init__(self, room: Room, rollout: Rollout, policy: SessionPolicy) -> None:
        self.rollout = rollout
        self.key = f"sk-up-{secrets.token_urlsafe(24)}"
        self._room = room
        self._policy = policy
        self._history = History(rollout.id, room.renderer, keeps_thinking=policy.gateway.thinking == "preserve")
        self._lineage = Lineage(self._history.graph)
        self._in_flight: set[Call] = set()
        self._recent: dict[bytes, Call] = {}
        """The newest calls by the digest of their bodies, oldest first, and all in flight."""
        self._planned = 0
        """Requests that got a prompt, side calls included: each has a number, and so a seed, of its own."""
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
        """Starts to answer, or gives the call that a retry repeats. Raises SealedRolloutError, MaxCallsError,
        ContextLengthError, TemplateError or EngineError before anything is sampled."""
        self._check_open()
        repeated = self._repeated(hints)
        if repeated is not None:
            self._room.metrics.replayed()
            return repeated.join()
        auxiliary = self._policy.auxiliary(request)
        if not auxiliary:
            self._check_calls()
        asked = _Asked(self._history.prompt(request.messages, request.tools), hints, auxiliary)
        try:
            plan = self._plan(request, asked.prompt)
        except ContextLengthError as error:
            self._truncated = self._truncated if auxiliary else error.code
            raise
        # Only now: a request that is refused costs the agent no call.
        self._planned += 1
        if not auxiliary:
            self._calls += 1
            self._truncated = None
        self._room.metrics.prompt(len(plan.prompt_ids), plan.reused_tokens)
        call = Call(self._room.engine, plan, lambda call: self._end(call, asked))
        self._in_flight.add(call)
        call.task.add_done_callback(lambda _: self._in_flight.discard(call))
        self._remember(call, hints)
        return call

    def count(self, request: AnswerRequest) -> int:
        """Tokens of the prompt that `begin` would send. Changes nothing; raises TemplateError."""
        prompt = self._history.prompt(request.messages, request.tools)
        return len(prompt.token_ids) + len(self._opening(request)[0])

    async def seal(self) -> SealedRollout:
        """Refuses new requests, cancels those in flight and waits until what they sampled is committed. Afterwards
        nothing is recorded. Raises DeadlineError when the engine does not let go."""
        self._sealed = True
        # Calls know their session: without this it lived on until the garbage collector came by, which it seldom does.
        self._recent.clear()
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

    def _check_calls(self) -> None:
        limit = self._policy.max_calls
        if limit is not None and self._calls >= limit:
            self._truncated = MaxCallsError.code
            raise MaxCallsError(f"rollout {self.rollout.id} has used its {limit} model calls; stop the agent here")

    def _repeated(self, hints: Hints) -> Call | None:
        """The call that a client sends again, while it is being answered or if it was."""
        call = self._recent.get(hints.body_digest) if hints.retry and hints.body_digest else None
        # One that is being cancelled has no answer to give, however long the engine takes to let go of it.
        return call if call is not None and call.delivered and not call.is_cancelled else None

    def _remember(self, call: Call, hints: Hints) -> None:
        if not hints.body_digest:
            return
        self._recent.pop(hints.body_digest, None)
        self._recent[hints.body_digest] = call
        complete = [digest for digest, each in self._recent.items() if each.task.done()]
        for digest in complete[:-REMEMBERED_CALLS]:
            del self._recent[digest]

    def _room_left(self, length: int) -> int:
        """Tokens left for an answer behind a prompt of `length` tokens."""
        limit = self._room.engine.context_length
        if length >= limit:
            raise ContextLengthError(
                f"the prompt has {length} tokens and the model's context holds {limit}, at least one of them for the "
                "answer; shorten the history"
            )
        return limit - length

    def _plan(self, request: AnswerRequest, prompt: Prompt) -> CallPlan:
        renderer, call = self._room.renderer, self._planned + 1
        opening, rules = self._opening(request)
        prompt_ids = np.concatenate([prompt.token_ids, opening])
        room = self._room_left(len(prompt_ids))
        params = [
            self._policy.sampling(request, room=room, stop_token_ids=renderer.stop_token_ids, call=call, answer=index)
            for index in range(request.answers)
        ]
        generations = [Generation(index, renderer, rules, opening) for index in range(request.answers)]
        name = f"call {call} of rollout {self.rollout.id}"
        return CallPlan(name, prompt_ids, params, generations, prompt.reused_tokens)

    def _opening(self, request: AnswerRequest) -> tuple[NDArray[np.int32], ReadingRules]:
        """What stands before the answer in its turn, and how the answer is read."""
        renderer, choice, after = self._room.renderer, request.tool_choice, request.messages[-1].role
        opening, forced_text = renderer.generation_prompt_after(after), ""
        if request.tools and choice.mode in ("required", "named"):
            opening = np.concatenate([opening, renderer.forced_prefix(choice.name, after)])
            forced_text = renderer.forced_text(choice.name, after)
        rules = ReadingRules(
            tool_calls=bool(request.tools) and choice.mode != "none",
            parallel_tool_calls=request.parallel_tool_calls,
            stop_strings=request.stop_strings,
            forced_text=forced_text,
            tools=request.tools,
            after=after,
        )
        return opening, rules

    def _end(self, call: Call, asked: _Asked) -> None:
        """Commits what a call sampled: the new context and its answers in one transaction."""
        if isinstance(call.error, EngineError | DeadlineError):
            self._failed = str(call.error)
        if not any(generation.token_ids for generation in call.plan.generations):
            return
        try:
            nodes = self._commit(call, asked)
        except UpspiralError as error:
            self._failed = str(error)
            raise
        except Exception as error:  # boundary: nobody may be served what is not recorded
            self._failed = f"{call.plan.name} could not be recorded: {type(error).__name__}: {error}"
            raise LedgerError(self._failed) from error
        errors = [error for generation in call.plan.generations for error in generation.answer().errors]
        self._room.metrics.committed(nodes, errors)

    def _commit(self, call: Call, asked: _Asked) -> list[Node]:
        parent, nodes, edges = self._add_context(asked, call)
        lost = self._lost_answer(parent, asked.hints)
        for generation in call.plan.generations:
            if not generation.token_ids:
                continue
            answered = Answered(generation.answer().message, call.delivered, asked.auxiliary, lost is not None)
            try:
                node = self._history.add_answer(parent, generation.tokens(), answered, asked.prompt)
            except ValueError as error:
                raise EngineError(f"rollout {self.rollout.id}: the engine's tokens are unusable: {error}") from error
            if lost is not None:
                edges.append(self._connected(Edge("retry", lost.id, node.id, "header")))
            self._lineage.answered(node, asked.hints, asked.prompt.continues)
            nodes.append(node)
        self._check_usage(call, nodes)
        self._room.store.commit(self.rollout.id, nodes, edges)
        return nodes

    def _lost_answer(self, parent: int | None, hints: Hints) -> Node | None:
        """The answer that a retry asks for again: the newest that nobody received, else the newest."""
        below = self._history.answers_below(parent) if hints.retry else []
        return max(below, key=lambda node: (not node.delivered, node.id), default=None)

    def _add_context(self, asked: _Asked, call: Call) -> tuple[int | None, list[Node], list[Edge]]:
        """The prompt's new nodes, and the edges that come with them."""
        prompt, start, edges = asked.prompt, None, []
        if self._history.begins_conversation(prompt) and not asked.auxiliary:
            start = self._lineage.start_of([segment.message for segment in prompt.segments], asked.hints, prompt.anchor)
        reason = "auxiliary" if asked.auxiliary else start.kind if start else None
        routes = (generation.prompt_routes for generation in call.plan.generations)
        known = next((each for each in routes if each is not None), None)
        parent, nodes = self._history.add_context(prompt, reason, known)
        if start is not None and nodes:
            edges.append(self._connected(self._lineage.started(nodes[0], start)))
        edges += [self._connected(edge) for edge in self._lineage.joins(nodes, prompt.continues)]
        return parent, nodes, edges

    def _connected(self, edge: Edge) -> Edge:
        self.graph.connect(edge)
        return edge

    def _check_usage(self, call: Call, nodes: list[Node]) -> None:
        """What the agent is told it used is what is recorded."""
        usage, answers = call.usage, [node for node in nodes if node.num_sampled]
        recorded = sum(node.num_sampled for node in answers)
        prompts = {self.graph.length(node.id) - node.num_sampled for node in answers}
        if recorded != usage.completion_tokens or prompts != {usage.prompt_tokens}:
            raise LedgerError(
                f"{call.plan.name}: served usage of {usage.prompt_tokens} + {usage.completion_tokens} tokens, recorded "
                f"{sorted(prompts)} + {recorded}; this is a bug in the gateway, please report it with trajectories.db"
            )
