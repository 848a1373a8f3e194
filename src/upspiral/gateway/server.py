"""The gateway: agents speak their wire API to it, it speaks token ids to the engine."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from upspiral.engine.base import Engine
from upspiral.errors import SealedRolloutError, UnknownKeyError, UpspiralError
from upspiral.gateway.admin import admin_routes
from upspiral.gateway.dialects.base import Dialect, Lookup, OpenChannel, ReadExchange, RolloutDesk, WireRequest
from upspiral.gateway.dialects.registry import DIALECTS, dialect_of
from upspiral.gateway.hints import hints_of
from upspiral.gateway.keys import api_key
from upspiral.gateway.metrics import GatewayMetrics
from upspiral.gateway.request import SessionPolicy
from upspiral.gateway.session import Room, SealedRollout, Session
from upspiral.gateway.socket import AnswerSocket
from upspiral.gateway.wire import (
    AnswerStream,
    failure_of,
    failure_response,
    finished_events,
    json_object,
    json_response,
    new_request_id,
    raw_body,
    request_headers,
)
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Rollout

__all__ = ["Gateway", "SealedRollout", "SessionPolicy"]

KEY_PREFIX = "/r/{key}"
"""Every route of an agent also exists below this prefix, for agents that let one set a URL but no key."""


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
        self._desks: dict[str, RolloutDesk] = {}
        """Of live rollouts."""
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
        self._desks[rollout.id] = RolloutDesk(self.model_name, room.renderer.decode, session.count)
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
            self._desks.pop(rollout_id, None)
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
            *self._agent_routes(""),
            *self._agent_routes(KEY_PREFIX),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            WebSocketRoute("/{path:path}", _refuse_socket),
        ]
        if self._admin_key is not None:
            routes += admin_routes(self, self._room.store, self._admin_key)
        handlers = dict.fromkeys((UpspiralError, HTTPException, RecursionError, Exception), _failed)
        return Starlette(routes=routes, exception_handlers=handlers)

    def _agent_routes(self, prefix: str) -> list[BaseRoute]:
        routes: list[BaseRoute] = []
        for dialect in DIALECTS:
            for path, read in dialect.answers.items():
                routes.append(Route(prefix + path, partial(self._answer, dialect, read), methods=["POST"]))
            for lookup in dialect.lookups:
                endpoint = partial(self._look_up, lookup)
                routes.append(Route(prefix + lookup.path, endpoint, methods=[lookup.method]))
            for path, open_channel in dialect.channels.items():
                routes.append(WebSocketRoute(prefix + path, partial(self._converse, dialect, open_channel)))
        routes.append(Route(f"{prefix}/v1/models", self._models))
        routes.append(Route(prefix + "/v1/models/{model:path}", self._model))
        return routes

    async def _answer(self, dialect: Dialect, read: ReadExchange, request: Request) -> Response:
        try:
            answered = await self._answer_exchange(dialect, read, request)
        except (UpspiralError, RecursionError) as error:
            answered = failure_response(failure_of(error), dialect)
        self._room.metrics.answered(answered.status_code)
        return answered

    async def _answer_exchange(self, dialect: Dialect, read: ReadExchange, request: Request) -> Response:
        session = self._session(request)
        raw = await raw_body(request)
        exchange = read(json_object(raw), self._desk(session))
        # The same body asks for something else on another path.
        digest = hashlib.blake2b(request.url.path.encode() + b"\n" + raw, digest_size=16).digest()
        call = session.begin(exchange.request, hints_of(request_headers(request), digest))
        if exchange.stream:
            return AnswerStream(call, exchange.writer(call), dialect)
        events = await finished_events(call, request)
        headers = {dialect.request_id_header: new_request_id()}
        return json_response(exchange.body(call, events), headers=headers)

    async def _look_up(self, lookup: Lookup, request: Request) -> Response:
        session = self._session(request)
        body = json_object(await raw_body(request)) if lookup.method == "POST" else {}
        wanted = WireRequest(body, request.path_params, request.query_params)
        return json_response(lookup.reply(wanted, self._desk(session)))

    async def _converse(self, dialect: Dialect, open_channel: OpenChannel, websocket: WebSocket) -> None:
        try:
            session = self._session(websocket)
        except UpspiralError as error:
            refused = failure_response(failure_of(error), dialect)
            self._room.metrics.answered(refused.status_code)
            await websocket.send_denial_response(refused)
            return
        channel = open_channel(self._desks[session.rollout.id])
        await AnswerSocket(websocket, channel, session.begin, self._room.metrics.answered).run()

    def _session(self, request: HTTPConnection) -> Session:
        """The live rollout that the request's key belongs to."""
        key = request.path_params.get("key") or api_key(request)
        rollout_id = self._rollout_of_key.get(key)
        if rollout_id is None:
            raise UnknownKeyError(self._unknown_key(key))
        session = self._live.get(rollout_id)
        if session is None:
            raise _sealed(rollout_id)
        return session

    def _desk(self, session: Session) -> RolloutDesk:
        """The rollout may have been sealed while the request's body arrived."""
        desk = self._desks.get(session.rollout.id)
        if desk is None:
            raise _sealed(session.rollout.id)
        return desk

    def _unknown_key(self, key: str) -> str:
        if key and key == self._admin_key:
            return "this is the admin key; open a rollout with POST /admin/rollouts and use the key it returns"
        if not key:
            return "no API key; send the rollout's key as 'Authorization: Bearer sk-up-...'"
        return f"no rollout has the API key {key[:9]}...; keys are valid for one rollout of the gateway that gave them"

    async def _models(self, request: Request) -> Response:
        return json_response(_dialect_of(request).models([self.model_name]))

    async def _model(self, request: Request) -> Response:
        """Any name: agents ask for the one that they are set to, and every name is answered by the same model."""
        return json_response(_dialect_of(request).model(request.path_params["model"]))

    async def _health(self, request: Request) -> Response:
        del request
        engine = self._room.engine
        return json_response({"status": "ok", "policy_version": engine.version, "live_rollouts": len(self._live)})

    async def _metrics(self, request: Request) -> Response:
        del request
        text = self._room.metrics.exposition(self._room.engine.stats(), len(self._live))
        return Response(text, media_type="text/plain; version=0.0.4")


async def _refuse_socket(websocket: WebSocket) -> None:
    paths = " and ".join(path for dialect in DIALECTS for path in dialect.channels)
    error = HTTPException(404, f"no WebSocket is served here, only at {paths}")
    await websocket.send_denial_response(failure_response(failure_of(error), DIALECTS[0]))


def _sealed(rollout_id: str) -> SealedRolloutError:
    return SealedRolloutError(f"rollout {rollout_id} has ended; nothing more is answered or recorded")


def _dialect_of(request: Request) -> Dialect:
    return dialect_of(request.url.path, request_headers(request))


async def _failed(request: Request, error: Exception) -> Response:
    """For Starlette's exception handlers: whatever no dialect's own handler caught."""
    return failure_response(failure_of(error), _dialect_of(request))
