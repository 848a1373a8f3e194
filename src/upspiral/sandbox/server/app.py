"""The server of sandboxes as an ASGI application."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from upspiral.errors import CapabilityError, RequestError, SandboxGoneError, UnknownKeyError
from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.pool import Pool
from upspiral.sandbox.server.lease import DELETED, Lease
from upspiral.sandbox.server.leases import Leases
from upspiral.sandbox.server.metrics import ServerMetrics
from upspiral.sandbox.server.tenants import Tenant, Tenants
from upspiral.sandbox.server.wire import (
    HEARTBEAT_S,
    KEY_HEADER,
    LONGEST_KEY,
    MOST_FORKS,
    DiffAnswer,
    ErrorAnswer,
    ForkRequest,
    HeartbeatAnswer,
    HeartbeatRequest,
    LeaseAnswer,
    LeasesAnswer,
    ListedSandbox,
    Listing,
    RestoreRequest,
    error_answer,
    read_body,
    read_spec,
    write_body,
)

_CLIENT_LEFT = 499
"""Nobody reads it."""
_LOG = logging.getLogger(__name__)
Endpoint = Callable[[Tenant, Request], Awaitable[Response]]


class SandboxServer:
    """Leases the sandboxes of a pool to tenants. `app` is the ASGI application; it wants a server in front that bounds
    bodies, headers and connections (`gateway.http.serve_app` does).

    Every request but /health and /metrics carries a tenant's token; what belongs to another tenant looks as if it did
    not exist.
    """

    def __init__(self, pool: Pool, tenants: Tenants, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._pool = pool
        self._tenants = tenants
        self._leases = Leases(pool, heartbeat_s=heartbeat_s)
        self._metrics = ServerMetrics()
        self.app = self._application()

    async def drain(self, *, timeout_s: float) -> None:
        """Gives out no more sandboxes; waits until those that are out have come back, but no longer than `timeout_s`;
        then stops the others, and the pool."""
        await self._leases.drain(timeout_s=timeout_s)
        await self._pool.stop()

    def _application(self) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._exposition),
            self._route("/capabilities", self._capabilities, "GET"),
            self._route("/sandboxes", self._list, "GET"),
            self._route("/sandboxes", self._create, "POST"),
            self._route("/creations/{key:path}", self._cancel_creation, "DELETE"),
            self._route("/heartbeat", self._heartbeat, "POST"),
            self._route("/sandboxes/{id}", self._look, "GET"),
            self._route("/sandboxes/{id}", self._delete, "DELETE"),
            self._route("/sandboxes/{id}/diff", self._diff, "POST"),
            self._route("/sandboxes/{id}/snapshot", self._snapshot, "POST"),
            self._route("/sandboxes/{id}/fork", self._fork, "POST"),
            self._route("/sandboxes/{id}/restore", self._restore, "POST"),
            self._route("/snapshots/{id}", self._drop, "DELETE"),
            WebSocketRoute("/sandboxes/{id}/frames", self._frames),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_address})

    def _route(self, path: str, endpoint: Endpoint, method: str) -> Route:
        async def answer(request: Request) -> Response:
            try:
                answered = await endpoint(self._tenant(request), request)
            except ClientDisconnect:
                return Response(status_code=_CLIENT_LEFT)
            except Exception as error:
                answered = _failed(error)
            self._metrics.answered(answered.status_code)
            return answered

        return Route(path, answer, methods=[method])

    def _tenant(self, request: HTTPConnection) -> Tenant:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        tenant = self._tenants.of_token(token.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise UnknownKeyError("no tenant has this token; send 'Authorization: Bearer TOKEN' with a tenant's own")
        return tenant

    # For everybody

    async def _health(self, request: Request) -> Response:
        del request
        status = "draining" if self._leases.is_draining else "ok"
        stats = self._pool.stats
        return _json({"status": status, "leases": len(self._leases), "live": stats.live, "queued": stats.queued})

    async def _exposition(self, request: Request) -> Response:
        del request
        text = self._metrics.exposition(len(self._leases)) + self._pool.exposition()
        return Response(text, media_type="text/plain; version=0.0.4")

    # For tenants

    async def _capabilities(self, tenant: Tenant, request: Request) -> Response:
        del request
        can = self._pool.capabilities
        # A path on the client's machine means nothing here, and one on this machine is not the client's to name.
        return _json(replace(can, mounts=False, forward_sockets=False, egress=can.egress and tenant.quota.egress))

    async def _list(self, tenant: Tenant, request: Request) -> Response:
        del request
        return _json(Listing([_listed(lease) for lease in self._leases.of(tenant)]))

    async def _create(self, tenant: Tenant, request: Request) -> Response:
        key = _idempotency_key(request)
        spec = read_spec(await request.body())
        _check_local(spec)
        return _json(_answer(await self._leases.create(tenant, key, spec)), 201)

    async def _cancel_creation(self, tenant: Tenant, request: Request) -> Response:
        await self._leases.cancel_creation(tenant, request.path_params["key"][:LONGEST_KEY])
        return Response(status_code=204)

    async def _heartbeat(self, tenant: Tenant, request: Request) -> Response:
        named = read_body(await request.body(), HeartbeatRequest)
        return _json(HeartbeatAnswer(self._leases.heartbeat(tenant, named.sandboxes, named.snapshots)))

    async def _look(self, tenant: Tenant, request: Request) -> Response:
        return _json(_answer(self._lease(tenant, request)))

    async def _delete(self, tenant: Tenant, request: Request) -> Response:
        """Stopping twice is harmless, so that a client may repeat it when an answer was lost."""
        with suppress(SandboxGoneError):
            await self._leases.end(self._lease(tenant, request), DELETED)
        return Response(status_code=204)

    async def _diff(self, tenant: Tenant, request: Request) -> Response:
        diff = await self._lease(tenant, request).sandbox.diff()
        return _json(DiffAnswer(diff.archive, [os.fsencode(path) for path in diff.removed]))

    async def _snapshot(self, tenant: Tenant, request: Request) -> Response:
        lease = self._lease(tenant, request)
        key = _idempotency_key(request)
        return _json(await lease.operations.do(key, lambda: self._leases.snapshot(lease)))

    async def _fork(self, tenant: Tenant, request: Request) -> Response:
        lease = self._lease(tenant, request)
        count = read_body(await request.body(), ForkRequest).count
        if not 1 <= count <= MOST_FORKS:
            raise RequestError(f"count must be from 1 to {MOST_FORKS}, not {count}")
        key = _idempotency_key(request)
        leases = await lease.operations.do(key, lambda: self._leases.fork(lease, count))
        return _json(LeasesAnswer([_answer(each) for each in leases]))

    async def _restore(self, tenant: Tenant, request: Request) -> Response:
        lease = self._lease(tenant, request)
        wanted = read_body(await request.body(), RestoreRequest).snapshot
        snapshot = self._leases.snapshots.find(tenant, wanted)
        await lease.operations.do(_idempotency_key(request), lambda: lease.sandbox.restore(snapshot))
        return Response(status_code=204)

    async def _drop(self, tenant: Tenant, request: Request) -> Response:
        await self._leases.snapshots.drop(tenant, request.path_params["id"])
        return Response(status_code=204)

    async def _frames(self, websocket: WebSocket) -> None:
        try:
            tenant = self._tenant(websocket)
            lease = self._leases.find(tenant, websocket.path_params["id"])
            session = lease.session(_session_id(websocket))
            received = _received(websocket)
        except Exception as error:
            refused = _failed(error)
            self._metrics.answered(refused.status_code)
            with suppress(WebSocketDisconnect, RuntimeError, OSError):  # it has gone already
                await websocket.send_denial_response(refused)
            return
        self._metrics.connections.inc()
        try:
            await websocket.accept()
        except (WebSocketDisconnect, RuntimeError, OSError):
            return  # as above
        await session.carry(websocket, received)

    def _lease(self, tenant: Tenant, request: HTTPConnection) -> Lease:
        return self._leases.find(tenant, request.path_params["id"])


def _check_local(spec: SandboxSpec) -> None:
    """A path on the client's machine means nothing here, and one on this machine is not the client's to name."""
    if spec.mounts or spec.forward_sockets:
        asked = "mounts" if spec.mounts else "forward_sockets"
        raise CapabilityError(f"{asked} name paths of one machine; a sandbox on a server cannot have them")


def _idempotency_key(request: Request) -> str:
    key = request.headers.get(KEY_HEADER, "")
    if not key or len(key) > LONGEST_KEY:
        raise RequestError(
            f"send {KEY_HEADER} with 1 to {LONGEST_KEY} characters, new for each thing that is asked for, and the same "
            "when it is asked for again"
        )
    return key


def _answer(lease: Lease) -> LeaseAnswer:
    return LeaseAnswer(lease.id, lease.ends_in_s, lease.heartbeat_s)


def _listed(lease: Lease) -> ListedSandbox:
    spec = lease.spec
    return ListedSandbox(lease.id, spec.labels, lease.age_s, lease.ends_in_s, spec.limits.memory_mb)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(write_body(value), status, headers, "application/json")


def _failed(error: Exception) -> Response:
    status, answer = error_answer(error)
    if status == 500:
        _LOG.error("a request failed", exc_info=error)
    retry_s = answer.retry_after_s
    return _json(answer, status, None if retry_s is None else {"retry-after": str(math.ceil(retry_s))})


async def _no_such_address(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, HTTPException)
    return _json(ErrorAnswer("http", error.detail), error.status_code)


def _session_id(websocket: WebSocket) -> str:
    session_id = websocket.query_params.get("session", "")
    if not 8 <= len(session_id) <= LONGEST_KEY:
        raise RequestError(f"session must have 8 to {LONGEST_KEY} characters, new for each line and hard to guess")
    return session_id


def _received(websocket: WebSocket) -> int:
    received = websocket.query_params.get("received", "0")
    if not (received.isascii() and received.isdigit() and len(received) < 20):
        raise RequestError(f"received must be a number of bytes, not {received[:40]!r}")
    return int(received)
