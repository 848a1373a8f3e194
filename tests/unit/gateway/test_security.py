"""Keys stay secret, and each rollout has only its own data."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import traceback
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.responses import Response

from tests.fixtures.live_gateway import ADMIN_KEY, LiveGateway, live_gateway
from upspiral.gateway.http import is_loopback, serve_app
from upspiral.gateway.limits import Limits
from upspiral.types import Rollout

LONG = "long " * 20_000
SHOWN = len("sk-up-") + 3
"""A refusal may show so much of a key, to tell which one was used."""


def chat(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **options}


async def post(url: str, key: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session:
        headers = {"authorization": f"Bearer {key}", **headers}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with session.post(url + path, data=data, headers=headers) as response:
            return response.status, await response.text()


def test_keys_are_in_no_log_no_error_and_no_repr(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    keys: list[str] = [ADMIN_KEY]

    async def main() -> None:
        asyncio.get_running_loop().set_debug(True)
        asyncio.get_running_loop().slow_callback_duration = 0
        async with live_gateway(
            tmp_path, ["3 files", "long " * 50, "and", "end", "of", "it"], tokens_per_chunk=1
        ) as live:
            keys.extend(live.gateway.open_rollout(Rollout(f"r{number}", "t", "g")) for number in range(3))
            told.extend([text for _, text in await exchanges(live, keys)])
            live.gateway.app.add_route("/bug", bug, methods=["POST"])
            told.append((await post(live.url, keys[1], {}, "/bug"))[1])
            await send_raw(live.url, f"GET / HTTP/1.1\r\nauthorization: Bearer {keys[1]}\r\nbad header\r\n\r\n")
            await send_raw(live.url, f"GET /{keys[1]} HTTP/9.9\r\n\r\n")
            told.extend(reprs_of_ours())

    asyncio.run(main(), debug=True)
    told.append(caplog.text)
    told.extend("".join(traceback.format_exception(record.exc_info[1])) for record in caplog.records if record.exc_info)
    told.extend(capfd.readouterr())
    assert "gateway has a bug" in "".join(told) and "Exception in ASGI application" in caplog.text
    for key in keys:
        assert not [text for text in told if key[: SHOWN + 1] in text]


async def bug(request: Any) -> Response:
    raise RuntimeError("a bug of ours")


async def exchanges(live: LiveGateway, keys: list[str]) -> list[tuple[int, str]]:
    """What clients are told, in good and in bad cases."""
    admin, first, second, third = keys
    await live.gateway.seal_rollout("r2")
    bad = [
        await post(live.url, first, chat("hi")),
        await post(live.url, second, chat("hi", stream=True)),
        await post(live.url, first, b"{"),
        await post(live.url, first, chat("hi", model=second)),
        await post(live.url, first, {"messages": 3}),
        await post(live.url, third, chat("hi")),
        await post(live.url, admin, chat("hi")),
        await post(live.url, first, {"reward": 1}, "/admin/rollouts/r0/finish"),
        await post(live.url, first + "x", chat("hi")),
        await post(live.url, first, chat("hi"), f"/nowhere?key={second}"),
        await post(live.url, first, chat("hi"), **{"x-api-key": second}),
        await post(live.url, "", chat(""), f"/r/{first}/v1/messages"),
        await post(live.url, "", chat(""), f"/r/{first}/nowhere"),
        await post(live.url, "", chat(""), f"/r/{third}/v1/chat/completions"),
        await post(live.url, second, chat("hi")),  # the script has ended: the engine fails
        await post(live.url, second, chat("hi")),
    ]
    assert {status for status, _ in bad} == {200, 400, 401, 404, 409, 500}
    return bad


async def send_raw(url: str, text: str) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(text.encode())
    assert b"400" in (await reader.read()).split(b"\r\n")[0]
    writer.close()


def reprs_of_ours() -> list[str]:
    """Every object of ours that lives while the gateway does."""
    found = [each for each in gc.get_objects() if str(type(each).__module__).startswith("upspiral")]
    assert len(found) > 20
    return [repr(each) for each in found]


def test_a_rollout_sees_only_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one", "two", "three"]) as live:
            keys = [live.gateway.open_rollout(Rollout(f"r{number}", "t", "g")) for number in range(2)]
            for key in keys:
                assert (await post(live.url, key, chat("the same question")))[0] == 200
            # The same words in two rollouts are two trees; neither continues the other's.
            assert [len(live.nodes(f"r{number}")) for number in range(2)] == [2, 2]
            for path in ("/admin/rollouts", "/admin/rollouts/r1/finish"):
                assert (await post(live.url, keys[0], {"reward": 1}, path))[0] == 401
            async with aiohttp.ClientSession(headers={"x-api-key": keys[0]}) as session:
                for path in ("/admin/rollouts", "/admin/rollouts/r1/graph", "/admin/rollouts/r0/graph"):
                    assert (await session.get(live.url + path)).status == 401
            assert live.gateway.is_live("r1")

    asyncio.run(main())


def test_a_reader_that_stops_cancels_its_call(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, [LONG], tokens_per_chunk=1, context_length=2**17) as live:
            key = live.gateway.open_rollout(Rollout("r1", "t", "g"))
            async with serve_app(live.gateway.app, limits=Limits(stall_timeout_s=0.5)) as url:
                connection = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                body = json.dumps(chat("hi", stream=True, logprobs=True))
                head = f"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer {key}\r\n"
                connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
                async with asyncio.timeout(30):
                    while not live.nodes():
                        await asyncio.sleep(0.05)
                connection.close()
            answer = live.nodes()[-1]
            assert not answer.delivered and answer.finish_reason == "cancelled"
            assert 0 < answer.num_sampled < len(live.renderer.encode_answer(LONG))
            assert live.engine.stats().running == 0

    asyncio.run(main())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_what_only_this_machine_reaches(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "2001:db8::1", "no.such.host.invalid"])
def test_what_others_may_reach(host: str) -> None:
    assert not is_loopback(host)
