"""The gateway: agents speak their wire API to it, it speaks token ids to the engine."""

from __future__ import annotations

from dataclasses import replace

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from upspiral.engine.base import Engine
from upspiral.errors import SealedRolloutError, UnknownKeyError, UpspiralError
from upspiral.gateway.admin import admin_routes
from upspiral.gateway.dialects import openai_chat
from upspiral.gateway.keys import api_key
from upspiral.gateway.metrics import GatewayMetrics
from upspiral.gateway.request import SessionPolicy
from upspiral.gateway.session import Room, SealedRollout, Session
from upspiral.gateway.wire import (
    EventStreamResponse,
    error_response,
    json_body,
    json_response,
    status_and_code,
    wait_for_answer,
)
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Rollout

__all__ = ["Gateway", "SealedRollout", "SessionPolicy"]


class Gateway:
    """Serves all rollouts of a process. `app` is the ASGI application; its methods are for the process that runs it and
    belong to one event loop.

    Raises TemplateError at construction when the model's chat template is not append-only.
    """

    def __init__(
        self,
        renderer: Renderer,
        engine: Engine,
        store: TrajectoryStore,
        *,
        model_name: str,
        admin_key: str | None = None,
    ) -> None:
        renderer.check_append_only()
        self.model_name = model_name
        self._room = Room(renderer, engine, store, GatewayMetrics())
        self._live: dict[str, Session] = {}
        self._rollout_of_key: dict[str, str] = {}
        """Sealed rollouts stay in here: their agents are told what happened."""
        self._sealed: dict[str, SealedRollout] = {}
        self._admin_key = admin_key
        self.app = self._application()

    def open_rollout(
        self, rollout: Rollout, *, policy: SessionPolicy | None = None, engine: Engine | None = None
    ) -> str:
        """Records the rollout in the store and returns the secret key that its agent uses as API key.

        `engine` answers this rollout in the gateway's engine's place; demonstrations are made so.
        """
        self._room.store.create_rollout(rollout)
        room = self._room if engine is None else replace(self._room, engine=engine)
        session = Session(room, rollout, policy or SessionPolicy())
        self._live[rollout.id] = session
        self._rollout_of_key[session.key] = rollout.id
        return session.key

    async def seal_rollout(self, rollout_id: str) -> SealedRollout:
        """Ends a rollout for its agent: what is in flight is cancelled and committed as not delivered, later requests
        get 409, and nothing more is recorded. Sealing twice is harmless. The caller records status and reward with the
        store.

        Raises KeyError when it was never opened here, DeadlineError when the engine does not let go.
        """
        session = self._live.get(rollout_id)
        if session is not None:
            self._sealed[rollout_id] = await session.seal()
            self._live.pop(rollout_id, None)
        return self._sealed[rollout_id]

    def failure(self, rollout_id: str) -> str | None:
        """What broke in the engine or the store, live or sealed: the rollout is to be masked (DESIGN law 6)."""
        return (self._live.get(rollout_id) or self._sealed[rollout_id]).failed

    def truncation(self, rollout_id: str) -> str | None:
        """The limit that the rollout's last request ran into, live or sealed: "max_calls" or
        "context_length_exceeded"."""
        return (self._live.get(rollout_id) or self._sealed[rollout_id]).truncated

    @property
    def recorded_tokens(self) -> int:
        """Sampled tokens in all nodes committed so far."""
        return self._room.metrics.recorded_tokens

    def is_live(self, rollout_id: str) -> bool:
        return rollout_id in self._live

    def graph(self, rollout_id: str) -> TrajectoryGraph:
        """What is recorded of a rollout, live or sealed."""
        session = self._live.get(rollout_id)
        return session.graph if session else self._room.store.graph(rollout_id)

    def _application(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._chat_completions, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        if self._admin_key is not None:
            routes += admin_routes(self, self._room.store, self._admin_key)
        handlers = {UpspiralError: error_response, HTTPException: error_response, Exception: error_response}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _chat_completions(self, request: Request) -> Response:
        try:
            answered = await self._answer_chat(request)
        except UpspiralError as error:
            self._room.metrics.answered(status_and_code(error)[0])
            raise
        self._room.metrics.answered(answered.status_code)
        return answered

    async def _answer_chat(self, request: Request) -> Response:
        session = self._session(request)
        chat = openai_chat.parse_request(await json_body(request))
        call = session.begin(chat.request)
        renderer = self._room.renderer
        if chat.stream:
            return EventStreamResponse(call, openai_chat.stream_chunks(call, chat, renderer, self.model_name))
        await wait_for_answer(call, request)
        return json_response(openai_chat.response(call, chat, renderer, self.model_name))

    def _session(self, request: Request) -> Session:
        """The live rollout that the request's key belongs to."""
        key = api_key(request)
        rollout_id = self._rollout_of_key.get(key)
        if rollout_id is None:
            raise UnknownKeyError(self._unknown_key(key))
        session = self._live.get(rollout_id)
        if session is None:
            raise SealedRolloutError(f"rollout {rollout_id} has ended; nothing more is answered or recorded")
        return session

    def _unknown_key(self, key: str) -> str:
        if key and key == self._admin_key:
            return "this is the admin key; open a rollout with POST /admin/rollouts and use the key it returns"
        if not key:
            return "no API key; send the rollout's key as 'Authorization: Bearer sk-up-...'"
        return f"no rollout has the API key {key[:9]}...; keys are valid for one rollout of the gateway that gave them"

    async def _models(self, request: Request) -> Response:
        del request
        model = {"id": self.model_name, "object": "model", "created": 0, "owned_by": "upspiral"}
        return json_response({"object": "list", "data": [model]})

    async def _health(self, request: Request) -> Response:
        del request
        engine = self._room.engine
        return json_response({"status": "ok", "policy_version": engine.version, "live_rollouts": len(self._live)})

    async def _metrics(self, request: Request) -> Response:
        del request
        text = self._room.metrics.exposition(self._room.engine.stats(), len(self._live))
        return Response(text, media_type="text/plain; version=0.0.4")
