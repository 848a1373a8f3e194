"""What every dialect's stream promises: it opens at once, never falls silent, and ends when its reader leaves."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fixtures.live_gateway import LiveGateway, live_gateway
from tests.fixtures.wire_client import StreamEvent, wire_client
from upspiral.gateway import wire
from upspiral.types import Rollout

SAY = [{"role": "user", "content": "How many files?"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": SAY},
    "/v1/responses": {"model": "m", "input": SAY},
    "/v1/messages": {"model": "m", "max_tokens": 400, "messages": SAY},
}
KEEPALIVES = {"/v1/chat/completions": ":", "/v1/responses": ":", "/v1/messages": "ping"}
paths = pytest.mark.parametrize("path", BODIES)


def text_of(event: StreamEvent) -> str:
    """The text that an event brings, in any dialect."""
    data = event.data
    if not isinstance(data, dict):
        return ""
    if data.get("choices"):
        return data["choices"][0]["delta"].get("content") or ""
    delta = data.get("delta")
    return delta if isinstance(delta, str) else (delta or {}).get("text", "")


@paths
def test_it_opens_before_the_first_token_and_brings_tokens_as_they_come(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        options: dict[str, Any] = {"tokens_per_chunk": 1, "pause_s": 0.15}
        async with live_gateway(tmp_path, ["a b c d"], **options) as live, wire_client(live) as client:
            times: list[float] = []
            async for event in client.stream(path, BODIES[path]):
                if not times:
                    times.append(event.after_s)
                    assert live.engine.stats().sampled_tokens == 0
                elif text_of(event):
                    times.append(event.after_s)
            assert len(times) > 4 and times[0] < times[1]
            assert all(later - earlier > 0.05 for earlier, later in pairwise(times[1:]))

    asyncio.run(main())


@paths
def test_it_is_never_silent(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "KEEPALIVE_S", 0.1)

    async def main() -> None:
        options: dict[str, Any] = {"tokens_per_chunk": 100, "pause_s": 0.6}
        async with live_gateway(tmp_path, ["one"], **options) as live, wire_client(live) as client:
            events = await client.events(path, BODIES[path])
            times = [event.after_s for event in events]
            assert max(later - earlier for earlier, later in pairwise(times)) < 0.4
            assert sum(event.name == KEEPALIVES[path] for event in events) >= 3
            assert "".join(map(text_of, events)) == "one"
            assert events[-1].name != KEEPALIVES[path]

    asyncio.run(main())


@paths
@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_who_leaves_ends_it(tmp_path: Path, path: str, stream: bool) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["long " * 300], tokens_per_chunk=1, pause_s=0.01) as live:
            key = live.gateway.open_rollout(Rollout("r1", "t", "g"))
            headers = {"authorization": f"Bearer {key}"}
            async with aiohttp.ClientSession(headers=headers) as session:
                asking = asyncio.create_task(read_all(session, live.url + path, {**BODIES[path], "stream": stream}))
                await until(lambda: live.engine.stats().sampled_tokens > 3)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            await until(lambda: len(live.nodes()) == 2)
            node = live.nodes()[1]
            assert not node.delivered and node.finish_reason == "cancelled" and 3 < node.num_sampled < 300
            assert live.engine.stats().running == 0

    asyncio.run(main())


async def read_all(session: aiohttp.ClientSession, url: str, body: Any) -> bytes:
    async with session.post(url, json=body) as response:
        return await response.read()


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@paths
def test_keys_in_urls(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one"]) as live, wire_client(live) as client:
            key, client.key = client.key, "none"
            assert (await client.post(f"/r/{key}{path}", BODIES[path])).status == 200
            assert (await client.post(f"/r/wrong{path}", BODIES[path])).status == 401
            assert (await client.post(path, BODIES[path])).status == 401
            await live.gateway.seal_rollout("r1")
            assert (await client.post(f"/r/{key}{path}", BODIES[path])).status == 409

    asyncio.run(main())


@paths
def test_deep_nesting_is_refused(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live:
            for depth in (900, 5000):
                nested = b"[" * depth + b"]" * depth
                raw = b'{"model": "m", "tools": [{"parameters": {"x": ' + nested + b"}}]}"
                assert await status_of_raw(live, path, raw) == 400

    asyncio.run(main())


@paths
@pytest.mark.parametrize("place", ["tools", "metadata"])
def test_nesting_that_can_be_read_but_not_written_is_refused_before_anything_is_sampled(
    tmp_path: Path, path: str, place: str
) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one"] * 200) as live:
            function = {"name": "look", "parameters": {"x": "deep"}, "input_schema": {"x": "deep"}}
            tool = function if path == "/v1/messages" else {"type": "function", **function, "function": function}
            raw = json.dumps({**BODIES[path], place: [tool] if place == "tools" else {"x": "deep"}})
            for depth in (100, *range(236, 258, 3), 300, 900):
                before = len(live.engine.calls)
                nested = raw.replace('"deep"', "[" * depth + "]" * depth)
                status = await status_of_raw(live, path, nested.encode())
                assert status == (200 if len(live.engine.calls) > before else 400), depth
                assert status == 200 or depth > 100
                assert status == 400 or depth < 300

    asyncio.run(main())


async def status_of_raw(live: LiveGateway, path: str, raw: bytes) -> int:
    key = live.gateway.open_rollout(Rollout(f"r{len(raw)}", "t", "g"))
    headers = {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession() as session, session.post(live.url + path, data=raw, headers=headers) as response:
        return response.status


@pytest.mark.parametrize("path", [*BODIES, "/v1/messages/count_tokens"])
def test_a_rollout_that_is_sealed_while_a_body_arrives(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one"]) as live:
            key = live.gateway.open_rollout(Rollout("r1", "t", "g"))
            body = json.dumps(BODIES.get(path, BODIES["/v1/messages"])).encode()
            host, _, port = live.url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body[:9])
            await asyncio.sleep(0.1)
            await live.gateway.seal_rollout("r1")
            writer.write(body[9:])
            assert (await reader.readline()).startswith(b"HTTP/1.1 409 ")
            assert not live.nodes()
            writer.close()

    asyncio.run(main())
