"""Requests to inference servers: whose fault a failure is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from upspiral.engine.http import Server
from upspiral.errors import ContextLengthError, DeadlineError, EngineError, EngineGoneError, RequestError


@asynccontextmanager
async def answering(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[Server]:
    app = web.Application()
    app.router.add_route("*", "/it", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server = Server(f"http://127.0.0.1:{runner.addresses[0][1]}/")
    try:
        yield server
    finally:
        await server.close()
        await runner.cleanup()


async def called(server: Server, how: str) -> Any:
    """An answer of {} to each of them is fine."""
    if how == "lines":
        return [event async for event in server.lines("/it", {})]
    return await (server.post("/it", {}, deadline_s=0.5) if how == "post" else server.get("/it", deadline_s=0.5))


@pytest.mark.parametrize("how", ["get", "post", "lines"])
def test_what_is_wrong_with_a_request_is_told_from_what_is_wrong_with_the_server(how: str) -> None:
    status, text = 200, "data: {}\n\n" if how == "lines" else "{}"

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text)

    async def check() -> None:
        nonlocal status, text
        async with answering(answer) as server:
            assert await called(server, how) == ([{}] if how == "lines" else {})
            for status, text, kind in (
                (400, "the context length is 7", ContextLengthError),
                (400, "top_k is a word", RequestError),
                (422, "no such field", RequestError),
                (503, "later", EngineError),
                (200, "data: {" if how == "lines" else "{", EngineError),
            ):
                with pytest.raises(kind) as caught:
                    await called(server, how)
                assert type(caught.value) is kind
                assert status == 200 or f"/it answered {status}: {text}" in str(caught.value)

    asyncio.run(asyncio.wait_for(check(), 20))


@pytest.mark.parametrize("how", ["get", "post", "lines"])
def test_nobody_there_is_told_from_somebody_who_is_slow(how: str) -> None:
    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        return web.Response(text="{}")

    async def check() -> None:
        async with answering(slow) as server:
            if how != "lines":  # where a full queue may stand before the first token
                with pytest.raises(DeadlineError, match="/it did not answer within"):
                    await called(server, how)
        with pytest.raises(EngineGoneError):
            await called(server, how)
        await server.close()

    asyncio.run(asyncio.wait_for(check(), 20))
