"""The admin API: opening and ending rollouts for people whose agents run elsewhere."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from upspiral.errors import RequestError, SealedRolloutError, StoreError
from upspiral.gateway.dialects.fields import shown, text_field
from upspiral.gateway.keys import check_admin_key
from upspiral.gateway.session import SealedRollout
from upspiral.gateway.wire import json_body, json_response
from upspiral.rendering.chat_template import template_message
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.ledger import account_uncredited, ledger_of
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Ledger, Node, Rollout, RolloutStatus

_MOST_LISTED = 1000


class RolloutHost(Protocol):
    """What the admin API needs of a gateway."""

    def open_rollout(self, rollout: Rollout) -> str: ...

    async def seal_rollout(self, rollout_id: str) -> SealedRollout: ...

    def is_live(self, rollout_id: str) -> bool: ...

    def graph(self, rollout_id: str) -> TrajectoryGraph: ...


class UnknownRolloutError(RequestError):
    """No rollout has this id."""

    status = 404
    code = "unknown_rollout"


def admin_routes(host: RolloutHost, store: TrajectoryStore, admin_key: str) -> list[Route]:
    admin = _Admin(host, store, admin_key)
    return [
        Route("/admin/rollouts", admin.listing, methods=["GET"]),
        Route("/admin/rollouts", admin.open, methods=["POST"]),
        Route("/admin/rollouts/{id}/finish", admin.finish, methods=["POST"]),
        Route("/admin/rollouts/{id}/graph", admin.graph),
    ]


class _Admin:
    def __init__(self, host: RolloutHost, store: TrajectoryStore, admin_key: str) -> None:
        self._host = host
        self._store = store
        self._admin_key = admin_key

    async def listing(self, request: Request) -> Response:
        """The newest rollouts, oldest first. Keys are told once, when a rollout is opened."""
        check_admin_key(request, self._admin_key)
        wanted = _Listing.of(request.query_params)
        found = self._store.rollouts(status=wanted.status)
        sampled = self._store.sampled_tokens()
        entries = [_rollout_entry(rollout, sampled.get(rollout.id, 0)) for rollout in found[-wanted.limit :]]
        return json_response({"rollouts": entries, "total": len(found)})

    async def open(self, request: Request) -> Response:
        check_admin_key(request, self._admin_key)
        body = await json_body(request)
        _check_known(body, "task", "group", "instruction")
        task, group = text_field(body, "task", "body"), text_field(body, "group", "body")
        instruction = body.get("instruction", "")
        if not isinstance(instruction, str):
            raise RequestError(
                f"body.instruction must be a string, not {shown(instruction)}; it is for people who read"
            )
        rollout = Rollout(f"r-{secrets.token_hex(6)}", task, group, split="served", instruction=instruction)
        key = self._host.open_rollout(rollout)
        return json_response({"rollout": rollout.id, "key": key})

    async def finish(self, request: Request) -> Response:
        check_admin_key(request, self._admin_key)
        rollout = self._rollout(request)
        body = await json_body(request)
        _check_known(body, "reward")
        reward = _reward(body)
        if not self._host.is_live(rollout.id):
            raise _ended(rollout)
        sealed = await self._host.seal_rollout(rollout.id)
        rollout = self._rollout(request)
        if rollout.status is not RolloutStatus.RUNNING:  # Another finish came while this one waited for the engine.
            raise _ended(rollout)
        status, reason = _outcome(sealed)
        # What broke says nothing about the agent (DESIGN law 6).
        reward = None if status is RolloutStatus.FAILED else reward
        self._store.finish_rollout(rollout.id, status=status, reason=reason, reward=reward)
        answer = {"rollout": rollout.id, "status": status.value, "reason": reason, "reward": reward}
        return json_response({**answer, "ledger": self._ledger(rollout.id, self._host.graph(rollout.id))})

    async def graph(self, request: Request) -> Response:
        check_admin_key(request, self._admin_key)
        rollout = self._rollout(request)
        graph = self._host.graph(rollout.id)
        return json_response(
            {
                "rollout": rollout.id,
                "task": rollout.task_id,
                "group": rollout.group_id,
                "status": rollout.status.value,
                "reward": rollout.reward,
                "nodes": [_node_entry(node) for node in graph.nodes],
                "edges": [msgspec.to_builtins(edge) for edge in graph.edges],
                "ledger": self._ledger(rollout.id, graph),
            }
        )

    def _rollout(self, request: Request) -> Rollout:
        rollout_id = request.path_params["id"]
        try:
            return self._store.rollout(rollout_id)
        except StoreError as error:
            raise UnknownRolloutError(f"no rollout {shown(rollout_id)}: {error}") from error

    def _ledger(self, rollout_id: str, graph: TrajectoryGraph) -> dict[str, Any]:
        credits = self._store.credits(rollout_id=rollout_id)
        if credits:
            return _ledger_entry(ledger_of(graph, credits[0]))
        return _ledger_entry(account_uncredited(self._store.rollout(rollout_id), graph.num_sampled))


@dataclass(frozen=True, slots=True)
class _Listing:
    """The query of a list: which rollouts, and how many at most."""

    status: RolloutStatus | None
    limit: int

    @classmethod
    def of(cls, query: Mapping[str, str]) -> _Listing:
        _check_known(query, "status", "limit", where="query")
        status, limit = query.get("status"), query.get("limit", str(_MOST_LISTED))
        if status is not None and status not in list(RolloutStatus):
            raise RequestError(f"query.status is {shown(status)}; known are {', '.join(RolloutStatus)}")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 10 and 1 <= int(limit) <= _MOST_LISTED):
            raise RequestError(f"query.limit must be an integer from 1 to {_MOST_LISTED}, not {shown(limit)}")
        return cls(None if status is None else RolloutStatus(status), int(limit))


def _check_known(fields: Mapping[str, Any], *known: str, where: str = "body") -> None:
    unknown = next((key for key in fields if key not in known), None)
    if unknown is not None:
        raise RequestError(f"{where}.{unknown[:80]} is not known; known are {', '.join(known)}")


def _reward(body: Mapping[str, Any]) -> float | None:
    if "reward" not in body:
        raise RequestError('body.reward is missing; send {"reward": 1.0}, or null when nothing judged the rollout')
    reward = body["reward"]
    if reward is None:
        return None
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise RequestError(f"body.reward must be a finite number or null, not {shown(reward)}")
    return float(reward)


def _ended(rollout: Rollout) -> SealedRolloutError:
    return SealedRolloutError(f"rollout {rollout.id} has ended before ({rollout.status.value})")


def _outcome(sealed: SealedRollout) -> tuple[RolloutStatus, str]:
    if sealed.failed is not None:
        return RolloutStatus.FAILED, sealed.failed
    if sealed.truncated is not None:
        return RolloutStatus.TRUNCATED, sealed.truncated
    return RolloutStatus.FINISHED, ""


def _rollout_entry(rollout: Rollout, tokens: int) -> dict[str, Any]:
    return {
        "id": rollout.id,
        "task": rollout.task_id,
        "group": rollout.group_id,
        "status": rollout.status.value,
        "reason": rollout.reason,
        "reward": rollout.reward,
        "tokens": tokens,
    }


def _node_entry(node: Node) -> dict[str, Any]:
    """A node as JSON; log-probabilities and versions are null where no policy sampled."""
    sampled = node.sampled.tolist()
    return {
        "id": node.id,
        "parent": node.parent,
        "reason": node.reason,
        "role": node.role,
        "token_ids": node.token_ids.tolist(),
        "sampled": sampled,
        "logprobs": [x if s else None for x, s in zip(node.logprobs.tolist(), sampled, strict=True)],
        "versions": [x if s else None for x, s in zip(node.versions.tolist(), sampled, strict=True)],
        "finish_reason": node.finish_reason,
        "delivered": node.delivered,
        "auxiliary": node.auxiliary,
        "message": None if node.message is None else template_message(node.message),
    }


def _ledger_entry(ledger: Ledger) -> dict[str, Any]:
    return {
        "sampled": ledger.sampled,
        "trained": ledger.trained,
        "masked": dict(ledger.masked),
        "dropped": dict(ledger.dropped),
        "difference": ledger.difference,
    }
