"""The router when things happen at the same time, or never end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.fixtures.failing_engine import FailingEngine, completion
from upspiral.engine import router as router_module
from upspiral.engine.router import Router
from upspiral.errors import EngineError
from upspiral.types import SamplingParams
from upspiral.weights.publication import Publication

PROMPT = list(range(1, 9))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_BACK_OFF_S", 0.001)
    monkeypatch.setattr(router_module, "_LONGEST_BACK_OFF_S", 0.01)
    monkeypatch.setattr(router_module, "_LOOK_AGAIN_S", 0.001)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(60):
            await work()

    asyncio.run(within())


async def read(router: Router, prompt: list[int] = PROMPT, count: int = 12) -> list[int]:
    chunks = router.generate(prompt, SamplingParams(max_tokens=count))
    return [token async for chunk in chunks for token in chunk.token_ids]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.001)


def version(number: int) -> Publication:
    return Publication(Path("nowhere"), number, None, 0)


class Doubtful(FailingEngine):
    """It has the version and cannot show it: a probe of its weights did not match."""

    adoptions = 0

    async def update_weights(self, publication: Publication) -> None:
        self.version = publication.version
        self.adoptions += 1
        if self.refuses:
            raise self.refuses.pop(0)


class Slow(FailingEngine):
    """Its updates take their turn, and as long as `gate` is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.adopted, self._lock = asyncio.Event(), list[int](), asyncio.Lock()
        self.gate.set()

    async def update_weights(self, publication: Publication) -> None:
        async with self._lock:
            await self.gate.wait()
            await super().update_weights(publication)
            self.adopted.append(publication.version)


def test_an_engine_that_comes_back_without_the_newest_weights_gets_no_work_until_it_has_them() -> None:
    async def check() -> None:
        engine = FailingEngine()
        router = Router([engine], patience_s=0.1)
        await router.update_weights(version(3))
        engine.version = -1  # started again, where what version 3 is a difference to is not
        with pytest.raises(EngineError, match=r"within 0.1 s \(engine 0: it has version -1, not 3\)"):
            await read(router)
        assert engine.prompts == []
        await router.update_weights(version(4))
        assert await read(router) == completion(PROMPT, 12)

    run(check)


def test_engines_that_never_come_back_end_a_generation_with_all_reasons() -> None:
    async def check() -> None:
        router = Router([FailingEngine(), FailingEngine()], patience_s=0.1)
        await router.stop()
        with pytest.raises(EngineError, match=r"within 0\.1 s \(engine 0: it is dead; engine 1: it is dead\)"):
            await read(router)

    run(check)


def test_an_engine_whose_weights_are_in_doubt_adopts_them_again() -> None:
    async def check() -> None:
        engines = [FailingEngine(), Doubtful()]
        router = Router(engines)
        engines[1].refuses = [EngineError("the probe does not match")]
        await router.update_weights(version(1))
        await until(lambda: engines[1].adoptions == 2)  # type: ignore[attr-defined]

    run(check)


def test_catching_up_never_brings_old_weights_back() -> None:
    async def check() -> None:
        slow = Slow()
        router = Router([FailingEngine(), slow])
        slow.refuses = [EngineError("not now")]
        await router.update_weights(version(1))
        await asyncio.sleep(0)  # it is about to catch up
        await router.update_weights(version(2))
        await asyncio.sleep(0.05)
        assert slow.adopted[-1] == slow.version == 2

    run(check)


def test_an_engine_that_leaves_during_an_update_takes_nobodys_outcome() -> None:
    async def check() -> None:
        first, second, third = Slow(), FailingEngine(), FailingEngine()
        router = Router([first, second, third])
        first.gate.clear()
        third.refuses = [EngineError("not this one")] * 3
        updating = asyncio.create_task(router.update_weights(version(1)))
        await asyncio.sleep(0.01)
        await router.drain(1, timeout_s=20.0)
        first.gate.set()
        await updating
        await until(lambda: third.version == 1)

    run(check)


def test_the_counts_of_an_engine_that_comes_back_are_counted_once() -> None:
    async def check() -> None:
        engine = FailingEngine()
        router = Router([engine, FailingEngine()])
        for number in range(8):
            await read(router, [number + 1])
        assert engine.sampled and router.stats().sampled_tokens == 8 * 12
        router.add(await router.drain(0, timeout_s=20.0))
        assert router.stats().sampled_tokens == 8 * 12
        for number in range(8):
            await read(router, [number + 1])
        assert router.stats().sampled_tokens == 16 * 12

    run(check)


def test_an_engine_that_failed_is_tried_by_one_generation_at_first() -> None:
    async def check() -> None:
        engines = [FailingEngine([0]), FailingEngine()]
        router = Router(engines)
        assert await read(router) == completion(PROMPT, 12)
        await asyncio.sleep(0.01)  # its back-off is over
        for each in engines:
            each.held.clear()
        many = [asyncio.create_task(read(router, [number])) for number in range(1, 11)]
        await asyncio.sleep(0.02)
        assert engines[0].running == 1, "while it has not answered"
        for each in engines:
            each.held.set()
        await asyncio.gather(*many)
        before = len(engines[0].prompts)
        await asyncio.gather(*(read(router, [number]) for number in range(30, 40)))
        assert len(engines[0].prompts) >= before + 4, "it has answered, so it has its share"

    run(check)


def test_generations_that_fail_together_close_their_engine_as_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_BACK_OFF_S", 0.1)
    monkeypatch.setattr(router_module, "_LONGEST_BACK_OFF_S", 1e9)

    async def check() -> None:
        engines = [FailingEngine([0] * 20), FailingEngine()]
        for each in engines:
            each.held.clear()
        router = Router(engines)
        many = [asyncio.create_task(read(router, [number])) for number in range(1, 41)]
        await until(lambda: [each.running for each in engines] == [20, 20])
        for each in engines:
            each.held.set()
        await asyncio.gather(*many)
        async with asyncio.timeout(20):
            while len(engines[0].prompts) == 20:  # until it is open again; 20 failures in a row would take a day
                await asyncio.gather(*(read(router, [number]) for number in range(50, 54)))
                await asyncio.sleep(0.02)

    run(check)


def test_an_engine_that_fails_all_day_is_still_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its failures are more than the exponent of a float can be."""

    monkeypatch.setattr(router_module, "_LONGEST_BACK_OFF_S", 0.0)
    monkeypatch.setattr(router_module, "_LOOK_AGAIN_S", 0.0)

    async def check() -> None:
        engines = [FailingEngine(), FailingEngine()]
        router = Router(engines)
        engines[1].refuses = [EngineError("not yet")] * 1100
        await router.update_weights(version(1))
        await until(lambda: engines[1].version == 1)

    run(check)


def test_engines_that_do_not_start_say_why_and_the_others_are_stopped() -> None:
    class Unable(FailingEngine):
        async def start(self) -> None:
            raise EngineError("it cannot start")

    async def check() -> None:
        able = FailingEngine()
        with pytest.raises(EngineError, match="it cannot start"):
            await Router([able, Unable()]).start()
        assert able.dead

    run(check)


def test_pauses_are_taken_back_only_where_they_were_taken() -> None:
    class Strict(FailingEngine):
        pauses = 0

        async def pause(self) -> None:
            await super().pause()
            self.pauses += 1

        def resume(self) -> None:
            assert self.pauses > 0, "resume() without pause()"
            self.pauses -= 1
            super().resume()

    async def check() -> None:
        engines = [Strict(), Strict()]
        router = Router(engines)
        engines[0].dead = True
        await router.pause()
        engines[0].dead = False
        router.resume()
        assert [each.pauses for each in engines] == [0, 0]
        assert await read(router) == completion(PROMPT, 12)

    run(check)


def test_all_engines_sleep_and_none_is_woken_by_a_version_that_it_still_lacks() -> None:
    async def check() -> None:
        engines = [FailingEngine(), FailingEngine()]
        router = Router(engines)
        engines[1].refuses = [EngineError("not now")]
        await router.update_weights(version(1))
        await router.sleep()
        waiting = asyncio.create_task(read(router))
        await asyncio.sleep(0.05)  # in which it would have been brought up to date
        assert [each.asleep for each in engines] == [True, True] and not waiting.done()
        await router.update_weights(version(2))
        assert await waiting == completion(PROMPT, 12)
        assert [each.version for each in engines] == [2, 2]
        engines[0].sleepless = EngineError("it has no memory saver")
        with pytest.raises(EngineError, match="no memory saver"):
            await router.sleep()

    run(check)
