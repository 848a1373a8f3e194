"""An engine served over a socket: the same tokens, versions and errors as beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from tests.fixtures.failing_engine import CONTEXT, FailingEngine, completion
from upspiral.engine.base import GenerationChunk, UpdatableEngine
from upspiral.engine.router import Router
from upspiral.engine.served.client import RemoteEngine
from upspiral.engine.served.server import EngineServer
from upspiral.engine.served.wire import chunk_frame, chunk_of
from upspiral.errors import ContextLengthError, EngineError, EngineGoneError, StaleBaseError
from upspiral.types import SamplingParams

from .test_router import PROMPT, run, tokens, version


@asynccontextmanager
async def served(engine: UpdatableEngine, key: str = "k") -> AsyncIterator[tuple[RemoteEngine, EngineServer]]:
    server = EngineServer(engine, "k")
    client = RemoteEngine("127.0.0.1", await server.start("127.0.0.1"), key)
    try:
        await client.start()
        yield client, server
    finally:
        await client.stop()
        await server.stop()


async def read(engine: RemoteEngine, prompt: list[int] = PROMPT, **params: Any) -> list[GenerationChunk]:
    return [chunk async for chunk in engine.generate(prompt, SamplingParams(**{"max_tokens": 12, **params}))]


def test_tokens_versions_and_counts_come_over() -> None:
    async def check() -> None:
        engine = FailingEngine()
        async with served(engine) as (client, _):
            assert client.context_length == CONTEXT
            chunks = await asyncio.gather(*(read(client, [number]) for number in range(1, 30)))
            for number, each in enumerate(chunks, 1):
                assert tokens(each) == completion([number], 12)
                assert each[-1].finish_reason == "length"
            assert client.stats().sampled_tokens == engine.sampled == 29 * 12
            await client.update_weights(version(3))
            assert client.version == 3
            assert {each for chunk in await read(client) for each in chunk.versions} == {3}

    run(check())


def test_errors_are_the_engines_own() -> None:
    async def check() -> None:
        engine = FailingEngine([4])
        async with served(engine) as (client, _):
            with pytest.raises(EngineError, match="told to fail"):
                await read(client)
            with pytest.raises(ContextLengthError):
                await read(client, [1] * CONTEXT)
            with pytest.raises(StaleBaseError, match="version 0 is not 7"):
                await client.update_weights(version(8, base=7))
            assert tokens(await read(client)) == completion(PROMPT, 12)

    run(check())


def test_a_router_that_does_not_wait_says_that_its_engine_is_gone_and_another_router_waits() -> None:
    """Of an actor whose vLLM dies: the actor's router leaves it to the run's, which has other engines."""

    async def check() -> None:
        engine = FailingEngine()
        async with served(Router([engine], patience_s=0.0)) as (client, _):
            engine.dead = True
            with pytest.raises(EngineGoneError, match="no engine came back"):
                await read(client)
            with pytest.raises(EngineGoneError, match="no engine could adopt version 1"):
                await client.update_weights(version(1))
            asyncio.get_running_loop().call_later(0.3, setattr, engine, "dead", False)
            outer = Router([client], patience_s=20.0)
            await outer.update_weights(version(2))
            chunks = [chunk async for chunk in outer.generate(PROMPT, SamplingParams(max_tokens=12))]
            assert tokens(chunks) == completion(PROMPT, 12) and engine.version == 2
            await outer.stop()

    run(check())


def test_a_reader_that_goes_ends_the_generation() -> None:
    async def check() -> None:
        engine = FailingEngine()
        async with served(engine) as (client, _):
            generation = client.generate(PROMPT, SamplingParams(max_tokens=200))
            async for _chunk in generation:
                break
            await generation.aclose()  # type: ignore[attr-defined]
            while engine.running:
                await asyncio.sleep(0.001)
            assert engine.sampled < 200

    run(check())


def test_pauses_hold_tokens_and_end_with_their_client() -> None:
    async def check() -> None:
        engine = FailingEngine()
        async with served(engine) as (client, _):
            await client.pause()
            waiting = asyncio.create_task(read(client))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            client.resume()
            assert tokens(await waiting) == completion(PROMPT, 12)
            await client.pause()
        await asyncio.sleep(0.01)
        assert engine.held.is_set(), "nobody is left to resume it"

    run(check())


def test_sleep_comes_over_and_the_next_weights_wake_it() -> None:
    async def check() -> None:
        engine = FailingEngine()
        async with served(engine) as (client, _):
            await client.sleep()
            assert engine.asleep
            waiting = asyncio.create_task(read(client))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await client.update_weights(version(3))
            assert tokens(await waiting) == completion(PROMPT, 12) and not engine.asleep
            engine.sleepless = EngineError("it has no memory saver")
            with pytest.raises(EngineError, match="no memory saver"):
                await client.sleep()

    run(check())


def test_a_server_that_ends_fails_what_is_under_way_and_all_that_follows() -> None:
    async def check() -> None:
        engine = FailingEngine()
        async with served(engine) as (client, server):
            engine.held.clear()
            waiting = asyncio.create_task(read(client))
            while not engine.running:
                await asyncio.sleep(0.001)
            await server.stop()
            with pytest.raises(EngineError, match="is gone"):
                await waiting
            with pytest.raises(EngineGoneError):
                await read(client)

    run(check())


def test_what_is_asked_of_a_server_that_ends_meanwhile_can_be_asked_of_the_next() -> None:
    class Slow(FailingEngine):
        async def sleep(self) -> None:
            await asyncio.Event().wait()

    async def check() -> None:
        async with served(Slow()) as (client, server):
            asking = asyncio.create_task(client.sleep())
            await asyncio.sleep(0.02)
            await server.stop()
            with pytest.raises(EngineGoneError):
                await asking

    run(check())


def test_who_has_another_key_is_turned_away() -> None:
    async def check() -> None:
        async with served(FailingEngine(), key="other"):
            pass

    with pytest.raises(EngineGoneError, match="the key is not its own"):
        run(check())


def test_routes_and_kept_ids_come_over() -> None:
    chunk = GenerationChunk(
        (1, 2), (-0.5, float(np.float32(-1.1))), (3, 4), "stop",
        np.arange(12, dtype=np.int16).reshape(2, 3, 2), np.zeros((5, 3, 2), np.int16),
        (None, np.array([4, 9], np.int32)),
    )  # fmt: skip
    back = chunk_of(chunk_frame(7, chunk))
    assert (list(back.token_ids), list(back.logprobs), list(back.versions)) == ([1, 2], [*chunk.logprobs], [3, 4])
    assert back.routes is not None and (back.routes == chunk.routes).all()
    assert back.prompt_routes is not None and back.prompt_routes.shape == (5, 3, 2)
    assert back.kept_ids[0] is None and back.kept_ids[1] is not None and back.kept_ids[1].tolist() == [4, 9]
