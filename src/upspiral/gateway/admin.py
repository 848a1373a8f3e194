"""The admin API: opening and ending rollouts for people whose agents run elsewhere."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
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
        Route("/admin/rollouts", admin.open, methods=["POST"]),
        Route("/admin/rollouts/{id}/finish", admin.finish, methods=["POST"]),
        Route("/admin/rollouts/{id}/graph", admin.graph),
    ]


class _Admin:
    def __init__(self, host: RolloutHost, store: TrajectoryStore, admin_key: str) -> None:
        self._host = host
        self._store = store
        self._admin_key = admin_key

    async def open(self, request: Request) -> Response:
        check_admin_key(request, self._admin_key)
        body = await json_body(request)
        task, group = text_field(body, "task", "body"), text_field(body, "group", "body")
        instruction = body.get("instruction") or ""
        name = f"r-{secrets.token_hex(6)}"
        rollout = Rollout(name, task, group, split="served", instruction=str(instruction))
        key = self._host.open_rollout(rollout)
        return json_response({"rollout": rollout.id, "key": key})

    async def finish(self, request: Request) -> Response:
        check_admin_key(request, self._admin_key)
        rollout = self._rollout(request)
        reward = _reward(await json_body(request))
        if not self._host.is_live(rollout.id):
            raise SealedRolloutError(f"rollout {rollout.id} has ended before ({rollout.status.value})")
        sealed = await self._host.seal_rollout(rollout.id)
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


def _reward(body: Mapping[str, Any]) -> float | None:
    if "reward" not in body:
        raise RequestError('body.reward is missing; send {"reward": 1.0}, or null when nothing judged the rollout')
    reward = body["reward"]
    if reward is None:
        return None
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise RequestError(f"body.reward must be a finite number or null, not {shown(reward)}")
    return float(reward)


def _outcome(sealed: SealedRollout) -> tuple[RolloutStatus, str]:
    if sealed.failed is not None:
        return RolloutStatus.FAILED, sealed.failed
    if sealed.truncated is not None:
        return RolloutStatus.TRUNCATED, sealed.truncated
    return RolloutStatus.FINISHED, ""


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
