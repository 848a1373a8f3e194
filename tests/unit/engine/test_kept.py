"""An engine that is started again when its process dies, but not while it sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.fixtures.failing_engine import FailingEngine, completion
from upspiral.engine import kept as kept_module
from upspiral.engine import router as router_module
from upspiral.engine.kept import KeptEngine
from upspiral.engine.router import Router
from upspiral.errors import DeadlineError, EngineError, EngineGoneError
from upspiral.types import SamplingParams

from .test_router import PROMPT, run, version


class Home:
    """An engine of this process that can be killed like one of another. `lets_start`: what its start waits for."""

    def __init__(self, lets_start: asyncio.Event | None = None) -> None:
        self.engine = FailingEngine()
        self._lets_start = lets_start
        self._gone = asyncio.Event()

    async def start(self) -> FailingEngine:
        if self._lets_start is not None:
            await self._lets_start.wait()
        return self.engine

    async def gone(self) -> str:
        await self._gone.wait()
        return "it was killed"

    async def kill(self) -> None:
        self.die()

    def die(self) -> None:
        self.engine.dead = True
        self.engine.held.set()  # what was under way ends
        self._gone.set()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_LOOK_AGAIN_S", 0.001)


@asynccontextmanager
async def keeping(make_home: Callable[[], Home] = Home) -> AsyncIterator[tuple[KeptEngine, list[Home]]]:
    """The engine, and its homes so far."""
    homes: list[Home] = []

    def make() -> Home:
        homes.append(make_home())
        return homes[-1]

    engine = KeptEngine(make)
    await engine.start()
    try:
        yield engine, homes
    finally:
        await engine.stop()


async def read(engine: KeptEngine) -> list[int]:
    chunks = [chunk async for chunk in engine.generate(PROMPT, SamplingParams(max_tokens=12))]
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


def test_what_dies_is_started_again_with_the_weights_that_it_had() -> None:
    async def check() -> None:
        async with keeping() as (engine, homes):
            await engine.update_weights(version(1))
            await homes[0].kill()
            await until(lambda: len(homes) == 2 and homes[1].engine.version == 1)
            assert await read(engine) == completion(PROMPT, 12)

    run(check())


@pytest.mark.parametrize("patience_s", [20.0, 0.02])
def test_new_weights_wait_for_an_engine_that_died_awake_as_long_as_they_may(patience_s: float) -> None:
    async def check() -> None:
        may_start = asyncio.Event()
        may_start.set()
        async with keeping(lambda: Home(may_start)) as (engine, homes):
            router = Router([engine], patience_s=patience_s)
            await router.update_weights(version(1))
            may_start.clear()
            await homes[0].kill()
            await until(lambda: len(homes) == 2)
            publishing = asyncio.create_task(router.update_weights(version(2)))
            await asyncio.sleep(0.05)
            if patience_s < 1.0:
                with pytest.raises(EngineError, match=r"could adopt version 2: .* another one is being started"):
                    await publishing
            else:
                may_start.set()
                await publishing
                assert engine.version == 2 and await read(engine) == completion(PROMPT, 12)

    run(check())


def test_what_dies_asleep_is_started_when_it_is_woken() -> None:
    async def check() -> None:
        async with keeping() as (engine, homes):
            router = Router([engine])
            await router.update_weights(version(1))
            await router.sleep()
            await homes[0].kill()
            await asyncio.sleep(0.05)
            assert len(homes) == 1, "the memory is the trainer's"
            with pytest.raises(EngineGoneError):
                await read(engine)
            await router.sleep()  # of nothing
            await router.update_weights(version(2))
            assert len(homes) == 2 and homes[1].engine.version == 2
            assert await read(engine) == completion(PROMPT, 12)

    run(check())


def test_what_dies_as_it_is_woken_is_started_too() -> None:
    async def check() -> None:
        async with keeping() as (engine, homes):
            router = Router([engine])
            await router.sleep()
            homes[0].engine.dead = True  # which nobody has noticed yet
            waking = asyncio.create_task(router.update_weights(version(1)))
            await asyncio.sleep(0.02)
            await homes[0].kill()
            await waking
            assert len(homes) == 2 and await read(engine) == completion(PROMPT, 12)

    run(check())


def test_nobody_waits_for_one_that_died_asleep_where_another_is_awake() -> None:
    async def check() -> None:
        may_start = asyncio.Event()
        may_start.set()
        async with keeping(lambda: Home(may_start)) as (dead, homes), keeping() as (other, _):
            router = Router([dead, other])
            await router.sleep()
            await homes[0].kill()
            may_start.clear()
            await router.update_weights(version(1))
            assert other.version == 1
            await until(lambda: len(homes) == 2)
            may_start.set()
            await until(lambda: homes[1].engine.version == 1)

    run(check())


def test_what_does_not_fall_asleep_is_ended() -> None:
    async def check() -> None:
        async with keeping() as (engine, homes):
            router = Router([engine])
            homes[0].engine.sleepless = EngineError("it cannot")
            await router.sleep()
            assert homes[0].engine.dead
            await router.sleep()
            await router.update_weights(version(1))
            assert len(homes) == 2 and await read(engine) == completion(PROMPT, 12)

    run(check())


def test_sleep_waits_for_a_start_that_is_under_way() -> None:
    async def check() -> None:
        may_start = asyncio.Event()
        may_start.set()
        async with keeping(lambda: Home(may_start)) as (engine, homes):
            may_start.clear()
            await homes[0].kill()
            await until(lambda: len(homes) == 2)
            falling_asleep = asyncio.create_task(engine.sleep())
            await asyncio.sleep(0.02)
            assert not falling_asleep.done(), "it takes memory at this moment"
            may_start.set()
            await falling_asleep
            assert homes[1].engine.asleep
            await engine.update_weights(version(1))
            assert not homes[1].engine.asleep and await read(engine) == completion(PROMPT, 12)

    run(check())


class Troubled(Home):
    """What watches it and what ends it fails with errors that nobody planned."""

    async def gone(self) -> str:
        await super().gone()
        raise FileNotFoundError("its log")

    async def kill(self) -> None:
        await super().kill()
        raise ZeroDivisionError("while it was killed")


def test_it_is_looked_after_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_module, "_PAUSE_BEFORE_RESTART_S", 0.001)

    async def check() -> None:
        made: list[Home] = []

        def make() -> Home:
            made.append(Troubled() if not made else Home())
            if len(made) == 2:
                raise KeyError("the second is not made")
            return made[-1]

        async with keeping(make) as (engine, homes):
            assert await read(engine) == completion(PROMPT, 12)
            homes[0].die()
            await until(lambda: len(homes) == 2)
            assert await read(engine) == completion(PROMPT, 12)
            assert engine.stats().sampled_tokens == 24, "those of the dead are counted"

    run(check())


def test_one_that_hangs_at_new_weights_is_ended_and_another_has_them() -> None:
    async def check() -> None:
        async with keeping() as (engine, homes):
            router = Router([engine])
            homes[0].engine.refuses = [DeadlineError("it did not answer within 600 s")]
            await router.update_weights(version(1))
            assert homes[0].engine.dead and len(homes) == 2
            assert engine.version == 1 and await read(engine) == completion(PROMPT, 12)

    run(check())
