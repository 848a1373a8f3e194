"""Whatever comes in on a WebSocket: each message has an answer, nothing of another rollout is in it, and the next one
is answered too. A new socket joins with one line in EXAMPLES.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from starlette.routing import WebSocketRoute

from tests.property.test_gateway_fuzz import (
    DEADLINE_S,
    RESPONSES,
    SECRET,
    TROUBLE,
    Stage,
    check_graph,
    draw_mutation,
    error_log,
    json_text,
    stage,
    troubled,
)
from upspiral.gateway.server import KEY_PREFIX
from upspiral.types import Rollout

__all__ = ["stage"]
CREATE: dict[str, Any] = {"type": "response.create", **RESPONSES}
LAST = ("response.completed", "response.incomplete", "response.failed", "error")
EXAMPLES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "/v1/responses": [
        CREATE,
        {**CREATE, "store": False, "previous_response_id": "OTHER", "stream": True},
        {**CREATE, "generate": False, "client_metadata": {"x-codex-turn-metadata": "{}"}},
    ],
}
ALL_PATHS = "/{path:path}"
"""Where there is no socket."""


@st.composite
def messages(draw: st.DrawFn) -> str | bytes:
    body = copy.deepcopy(dict(draw(st.sampled_from(EXAMPLES["/v1/responses"]))))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 4]))):
        if body:
            draw_mutation(draw, body)
    raw = json_text(body).encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["text"] * 6 + ["binary", "trouble"]))
    if kind == "trouble":
        raw = troubled(draw(TROUBLE), raw)
    # A lone surrogate has no place in text, which a client's library would not send.
    return raw if kind == "binary" else raw.decode("utf-8", "replace")


def test_every_socket_is_fuzzed(stage: Stage) -> None:
    routes = [route for route in stage.gateway.app.routes if isinstance(route, WebSocketRoute)]
    assert {route.path.removeprefix(KEY_PREFIX) for route in routes} == {*EXAMPLES, ALL_PATHS}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(sent=st.lists(messages(), min_size=1, max_size=3))
def test_each_message_is_answered_and_nothing_leaks(stage: Stage, sent: list[str | bytes]) -> None:
    before = len(stage.gateway.graph("other").nodes)
    with error_log() as errors:
        told = stage.runner.run(in_a_new_rollout(stage, sent))
    assert not errors
    text = "".join(told).encode()
    assert not [secret for secret in stage.secrets if secret in text]
    assert len(stage.gateway.graph("other").nodes) == before


async def in_a_new_rollout(stage: Stage, sent: Sequence[str | bytes]) -> list[str]:
    stage.rollouts += 1
    name = f"r{stage.rollouts}"
    key = stage.gateway.open_rollout(Rollout(name, "t", "g"))
    told: list[str] = []
    last: Any = None
    async with (
        asyncio.timeout(DEADLINE_S),
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{stage.url}/r/{key}/v1/responses") as socket,
    ):
        for message in [*sent, json.dumps(CREATE)]:
            if isinstance(message, bytes):
                await socket.send_bytes(message)
            else:
                await socket.send_str(message.replace("OTHER", stage.other_response))
            last = await answer(socket, told)
        assert last["type"] in LAST[:2], last
    await stage.gateway.seal_rollout(name)
    check_graph(stage, name)
    return told


async def answer(socket: aiohttp.ClientWebSocketResponse, told: list[str]) -> Any:
    """Reads up to the last event of a response, or to an error. Returns it."""
    while True:
        told.append(await socket.receive_str())
        data = json.loads(told[-1])
        if data["type"] in LAST:
            break
    event(f"{data['type']} {data.get('status')}")
    if data["type"] == "error":
        assert 400 <= data["status"] < 500 and data["error"]["message"], data
    assert data["type"] != "response.failed" and SECRET not in told[-1], data
    return data
