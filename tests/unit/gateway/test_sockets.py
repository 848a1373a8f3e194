"""A WebSocket says what a stream says, and its client can take no more than one of HTTP can."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket as sockets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fixtures.live_gateway import ADMIN_KEY, LiveGateway, live_gateway
from tests.fixtures.wire_client import StreamEvent, WireClient, wire_client
from upspiral.gateway import socket
from upspiral.gateway.http import serve_app
from upspiral.gateway.limits import Limits
from upspiral.types import Rollout

PATH = "/v1/responses"
LONG = "long " * 300
HANDSHAKE = (
    "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@asynccontextmanager
async def limited(live: LiveGateway, **limits: Any) -> AsyncIterator[LiveGateway]:
    async with serve_app(live.gateway.app, limits=Limits(**limits)) as url:
        yield replace(live, url=url)


def run(folder: Path, script: list[str], body: Callable[[LiveGateway, WireClient], Any], **options: Any) -> None:
    """With a gateway of `limits` and a client of its own rollout."""
    limits = options.pop("limits", {})

    async def main() -> None:
        async with (
            asyncio.timeout(30),
            live_gateway(folder, script, **options) as live,
            limited(live, **limits) as served,
            wire_client(served) as client,
        ):
            await body(served, client)

    asyncio.run(main())


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def without_names(event: StreamEvent) -> str:
    """An event without what is random or a time."""
    text = re.sub(r'"[a-z]+_[0-9a-f]{16,}"', '"ID"', json.dumps(event.data))
    return re.sub(r'"(created_at|completed_at)": \d+', "", text)


def test_it_brings_the_events_of_a_stream(tmp_path: Path) -> None:
    call = '<think>hm</think>Look.<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
    tool = {"type": "function", "name": "bash", "parameters": {"type": "object", "properties": {}}}
    body = {"model": "any", "input": "How many files?", "tools": [tool], "store": False}

    async def both(live: LiveGateway, client: WireClient) -> None:
        streamed = await client.events(PATH, body)
        async with client.connect() as opened:
            sent = await opened.create(**body)
        assert streamed[-1].data == "[DONE]"
        assert [without_names(event) for event in sent] == [without_names(event) for event in streamed[:-1]]
        assert len(live.nodes()) == 3 and len(live.gateway.graph("r1").leaves()) == 2

    run(tmp_path, [call, call], both)


@pytest.mark.parametrize("in_path", [False, True])
def test_keys(tmp_path: Path, in_path: bool) -> None:
    async def knock(live: LiveGateway, client: WireClient) -> None:
        ended = live.gateway.open_rollout(Rollout("r2", "t", "g"))
        await live.gateway.seal_rollout("r2")
        for key, status in [(client.key, 101), ("wrong", 401), (ADMIN_KEY, 401), (ended, 409)]:
            path = f"/r/{key}{PATH}" if in_path else PATH
            headers = {} if in_path else {"authorization": f"Bearer {key}"}
            if status == 101:
                async with client.connect(path, headers) as opened:
                    assert (await opened.create(input="hi"))[-1].name == "response.completed"
                continue
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                async with client.connect(path, headers):
                    pass
            assert caught.value.status == status
        answer = await raw_answer(live.url, f"GET {PATH} HTTP/1.1\r\nhost: x\r\n{HANDSHAKE}\r\n")
        assert b" 401 " in answer and b'"message":"no API key' in answer

    run(tmp_path, ["one"], knock)


async def raw_answer(url: str, text: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(text.encode("latin-1"))
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


def test_what_is_no_handshake(tmp_path: Path) -> None:
    async def knock(live: LiveGateway, client: WireClient) -> None:
        own, many = f"host: x\r\nauthorization: Bearer {client.key}\r\n", "x: y\r\n" * 100
        for request, status, said in [
            (f"GET {PATH} HTTP/1.1\r\n{own}connection: close\r\n\r\n", 400, "GET is for WebSockets"),
            (f"POST {PATH} HTTP/1.1\r\n{own}{HANDSHAKE}content-length: 2\r\n\r\n{{}}", 400, "opened with GET"),
            (f"GET /v1/\xff HTTP/1.1\r\n{own}{HANDSHAKE}\r\n", 400, ""),
            (f"GET {PATH} HTTP/1.1\r\n{own}{HANDSHAKE}x: {'y' * 9000}\r\n\r\n", 431, "headers"),
            (f"GET {PATH} HTTP/1.1\r\n{own}{HANDSHAKE}{many}\r\n", 431, "headers"),
            (f"GET /v1/messages HTTP/1.1\r\n{own}{HANDSHAKE}\r\n", 404, f"only at {PATH}"),
            (f"GET {PATH} HTTP/1.1\r\n{own}connection: upgrade\r\nupgrade: websocket\r\n\r\n", 400, ""),
        ]:
            answer = (await raw_answer(live.url, request)).decode()
            assert answer.startswith(f"HTTP/1.1 {status} ") and said in answer, answer
        assert not live.engine.calls

    run(tmp_path, [], knock)


def test_a_handshake_behind_a_request_that_is_being_answered(tmp_path: Path) -> None:
    async def knock(live: LiveGateway, client: WireClient) -> None:
        own, body = f"host: x\r\nauthorization: Bearer {client.key}\r\n", '{"input": "hi", "stream": true}'
        post = f"POST {PATH} HTTP/1.1\r\n{own}content-length: {len(body)}\r\n\r\n{body}"
        answer = await raw_answer(live.url, f"{post}GET {PATH} HTTP/1.1\r\n{own}{HANDSHAKE}\r\n")
        assert b" 101 " not in answer
        assert not live.nodes() or not live.nodes()[-1].delivered

    run(tmp_path, [LONG], knock, tokens_per_chunk=1, pause_s=0.01)


def test_a_client_that_leaves_cancels_its_call(tmp_path: Path) -> None:
    async def leave(live: LiveGateway, client: WireClient) -> None:
        async with client.connect() as opened:
            await opened.socket.send_json({"type": "response.create", "input": "hi"})
            await until(lambda: live.engine.stats().sampled_tokens > 3)
        await until(lambda: live.nodes())
        node = live.nodes()[-1]
        assert not node.delivered and node.finish_reason == "cancelled" and 3 < node.num_sampled < 300
        assert live.engine.stats().running == 0

    run(tmp_path, [LONG], leave, tokens_per_chunk=1, pause_s=0.01)


def test_a_client_that_stops_reading_is_let_go(tmp_path: Path) -> None:
    async def stall(live: LiveGateway, client: WireClient) -> None:
        connection = sockets.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])))
        connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        connection.sendall(f"GET /r/{client.key}{PATH} HTTP/1.1\r\nhost: x\r\n{HANDSHAKE}\r\n".encode())
        assert b" 101 " in await asyncio.to_thread(connection.recv, 1000)
        # Its metadata comes back with each state of the response: more than a connection's buffers hold.
        body = json.dumps({"type": "response.create", "input": "hi", "metadata": {"a": "x" * 4_000_000}}).encode()
        await asyncio.to_thread(connection.sendall, frame(body))
        await until(live.nodes)
        connection.close()
        assert not live.nodes()[-1].delivered and live.engine.stats().running == 0

    run(tmp_path, [LONG], stall, tokens_per_chunk=1, pause_s=0.01, limits={"stall_timeout_s": 0.5})


def frame(text: bytes) -> bytes:
    """A text message, masked with zeros."""
    return b"\x81\xff" + len(text).to_bytes(8, "big") + bytes(4) + text


def test_a_message_that_is_too_large_or_too_slow(tmp_path: Path) -> None:
    async def send(live: LiveGateway, client: WireClient) -> None:
        async with client.connect() as opened:
            assert (await opened.create(input="x" * 1500))[-1].name == "response.completed"
            await opened.socket.send_str("x" * 2_000_000)
            assert await opened.close_code() == 1009
        reader, writer = await asyncio.open_connection("127.0.0.1", int(live.url.rpartition(":")[2]))
        writer.write(f"GET /r/{client.key}{PATH} HTTP/1.1\r\nhost: x\r\n{HANDSHAKE}\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(frame(b"x" * 100)[:50])
        assert b"did not arrive within 0.3 s" in await reader.read()
        writer.close()

    run(tmp_path, ["one"], send, limits={"body_bytes": 2000, "body_timeout_s": 0.3})


def test_it_is_pinged_while_it_is_silent_and_a_dead_client_is_let_go(tmp_path: Path) -> None:
    async def wait(live: LiveGateway, client: WireClient) -> None:
        async with client.connect(autoping=False) as opened:
            assert (await opened.socket.receive(timeout=5)).type == aiohttp.WSMsgType.PING
            assert await opened.close_code() == 1011
        # Longer than a connection of HTTP may be idle.
        async with client.connect() as opened:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(opened.socket.receive(), 1.5)
            assert (await opened.create(input="hi"))[-1].name == "response.completed"

    run(tmp_path, ["one"], wait, limits={"ping_interval_s": 0.1, "pong_timeout_s": 0.3, "idle_timeout_s": 1})


def test_it_counts_as_a_connection(tmp_path: Path) -> None:
    async def fill(live: LiveGateway, client: WireClient) -> None:
        async with client.connect():
            answer = await raw_answer(live.url, "GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b" 503 " in answer and b"too_many_connections" in answer
        await asyncio.sleep(0.1)
        assert b" 200 " in await raw_answer(live.url, "GET /health HTTP/1.1\r\nconnection: close\r\n\r\n")

    run(tmp_path, [], fill, limits={"connections": 1})


def test_messages_sent_ahead_are_answered_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "MOST_WAITING", 2)

    async def send(live: LiveGateway, client: WireClient) -> None:
        async with client.connect(headers={"x-api-key": client.key, "x-stainless-retry-count": "1"}) as opened:
            for number in range(8):
                text = "same" if number < 2 else f"other {number}"
                await opened.socket.send_json({"type": "response.create", "input": text})
            answers = [await opened.response() for _ in range(8)]
        texts = [events[-1].data["response"]["output"][0]["content"][0]["text"] for events in answers]
        assert texts == [f"answer {number}" for number in range(8)]

    run(tmp_path, [f"answer {number}" for number in range(8)], send)


def test_a_bad_message_is_an_error_and_the_next_is_answered(tmp_path: Path) -> None:
    async def send(live: LiveGateway, client: WireClient) -> None:
        async with client.connect() as opened:
            for text, field in [("{", None), ("[]", None), ("{}", "type"), ('{"type": "session.update"}', "type")]:
                await opened.socket.send_str(text)
                error = (await opened.event()).data
                assert error["status"] == 400 and error["error"]["param"] == field
            await opened.socket.send_bytes(b'{"type": "response.create", "input": "hi"}')
            assert "not binary" in (await opened.event()).data["error"]["message"]
            assert (await opened.create(input="hi", generate=1))[0].data["error"]["param"] == "generate"
            assert (await opened.create(input="hi", background=True))[0].data["error"]["param"] == "background"
            await opened.socket.send_json({"type": "response.processed", "response_id": "resp_1"})
            assert (await opened.create(input="hi"))[-1].name == "response.completed"

    run(tmp_path, ["one"], send)


def test_deep_nesting_is_written_again_or_refused(tmp_path: Path) -> None:
    async def send(live: LiveGateway, client: WireClient) -> None:
        async with client.connect() as opened:
            for depth in range(240, 260):
                text = '{"type": "response.create", "input": "hi", "text": {"verbosity": DEEP}}'
                await opened.socket.send_str(text.replace("DEEP", "[" * depth + "]" * depth))
                assert (await opened.response())[-1].name in ("response.completed", "error")

    run(tmp_path, ["one"] * 20, send)


def test_a_bug_of_ours_is_told_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a bug")

    async def send(live: LiveGateway, client: WireClient) -> None:
        async with client.connect() as opened:
            monkeypatch.setattr(socket, "hints_of", fail)
            assert (await opened.create(input="hi"))[0].data["status"] == 500
            await opened.close_code()
        assert "Exception in ASGI application" in caplog.text

    run(tmp_path, [], send)


def test_what_a_socket_remembers(tmp_path: Path) -> None:
    async def talk(live: LiveGateway, client: WireClient) -> None:
        async with client.connect() as opened, client.connect() as other:
            own = (await opened.create(input="one", store=False))[-1].data["response"]["id"]
            stored = (await opened.create(input="two"))[-1].data["response"]["id"]
            assert (await client.call("GET", f"{PATH}/{own}")).status == 404
            # Another socket goes on from what was stored only; and so does its own, when a continuation failed.
            for name, code in [(own, "previous_response_not_found"), (stored, None)]:
                event = (await other.create(input="on", previous_response_id=name))[-1]
                assert event.data.get("error", {}).get("code") == code
            for name in (own, stored):
                too_long = await opened.create(input="x" * 20_000, previous_response_id=name, store=False)
                assert too_long[0].data["error"]["code"] == "context_length_exceeded"
            for name, code in [(own, "previous_response_not_found"), (stored, None)]:
                event = (await opened.create(input="on", previous_response_id=name))[-1]
                assert event.data.get("error", {}).get("code") == code

    run(tmp_path, ["1", "2", "3", "4"], talk, context_length=4000)


def test_an_old_socket_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "LIFETIME_S", 0.4)

    async def wait(live: LiveGateway, client: WireClient) -> None:
        async with client.connect() as opened:
            # Not in the middle of an answer.
            assert (await opened.create(input="hi"))[-1].name == "response.completed"
            error = (await opened.event()).data
            assert error["error"]["code"] == "websocket_connection_limit_reached" and error["status"] == 400
            assert await opened.close_code() == 1001

    run(tmp_path, ["one"], wait, tokens_per_chunk=100, pause_s=0.6)


def test_a_rollout_that_ends_while_it_is_open(tmp_path: Path) -> None:
    async def seal(live: LiveGateway, client: WireClient) -> None:
        async with client.connect() as opened:
            await opened.socket.send_json({"type": "response.create", "input": "hi"})
            await until(lambda: live.engine.stats().sampled_tokens > 3)
            await live.gateway.seal_rollout("r1")
            last = (await opened.response())[-1].data
            assert last["type"] == "response.failed" and "ended while" in last["response"]["error"]["message"]
            before = len(live.gateway.graph("r1").nodes)
            assert (await opened.create(input="more"))[0].data["status"] == 409
            assert await opened.close_code() == 1008
        assert len(live.gateway.graph("r1").nodes) == before

    run(tmp_path, [LONG], seal, tokens_per_chunk=1, pause_s=0.01)


def test_what_codex_says_of_a_message_is_heard(tmp_path: Path) -> None:
    async def talk(live: LiveGateway, client: WireClient) -> None:
        async with client.connect() as opened:
            for thread, parent in [("main", ""), ("helper", "main")]:
                turn = json.dumps({"thread_id": thread, "parent_thread_id": parent})
                metadata = {"x-codex-turn-metadata": turn}
                assert (await opened.create(input=f"I am {thread}", client_metadata=metadata))[-1].name.endswith("ted")
        assert [edge.kind for edge in live.gateway.graph("r1").edges] == ["spawn"]

    run(tmp_path, ["one", "two"], talk)


def test_keys_are_in_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    caplog.set_level(logging.DEBUG)
    keys: list[str] = []

    async def talk(live: LiveGateway, client: WireClient) -> None:
        # As an embedding process may do that wants to see everything.
        for name in ("uvicorn", "uvicorn.error", "websockets"):
            caplog.set_level(logging.DEBUG, name)
        keys.append(client.key)
        for path in (f"/r/{client.key}{PATH}", f"{PATH}?key={client.key}", f"/{client.key}", f"/r/{client.key}x{PATH}"):
            try:
                async with client.connect(path) as opened:
                    assert (await opened.create(input="hi"))[-1].name == "response.completed"
            except aiohttp.WSServerHandshakeError as error:
                assert error.status in (401, 404)

    run(tmp_path, ["one", "two"], talk)
    assert keys and not [text for text in (caplog.text, *capfd.readouterr()) if keys[0][:12] in text]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
