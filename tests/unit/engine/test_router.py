"""The router: failing engines, prefixes, load, versions, draining."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.failing_engine import CONTEXT, FailingEngine, completion
from upspiral.engine import router as router_module
from upspiral.engine.affinity import BLOCK_TOKENS, Affinity
from upspiral.engine.base import GenerationChunk
from upspiral.engine.router import MOST_ATTEMPTS, Router
from upspiral.errors import ContextLengthError, DeadlineError, EngineError, StaleBaseError
from upspiral.types import SamplingParams
from upspiral.weights.publication import Publication

Result = TypeVar("Result")
PROMPT = list(range(1, 9))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_BACK_OFF_S", 0.001)
    monkeypatch.setattr(router_module, "_LOOK_AGAIN_S", 0.001)


def run(work: Awaitable[Result]) -> Result:
    async def within() -> Result:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(within())


async def read(router: Router, prompt: Sequence[int] = PROMPT, **params: Any) -> list[GenerationChunk]:
    return [chunk async for chunk in router.generate(prompt, SamplingParams(**{"max_tokens": 12, **params}))]


def tokens(chunks: Sequence[GenerationChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def version(number: int, base: int | None = None) -> Publication:
    return Publication(Path("nowhere"), number, base, 0)


PLANS = st.lists(st.lists(st.none() | st.integers(0, 12), max_size=6), min_size=1, max_size=4)
ASKED = st.lists(st.tuples(st.lists(st.integers(1, 90), min_size=1, max_size=80), st.integers(1, 15)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(PLANS, ASKED)
def test_whatever_fails_each_token_comes_once_and_in_its_place(
    plans: list[list[int | None]], asked: list[tuple[list[int], int]]
) -> None:
    engines = [FailingEngine(plan) for plan in plans]
    router = Router(engines)

    async def one(prompt: list[int], count: int) -> None:
        try:
            chunks = await read(router, prompt, max_tokens=count)
        except EngineError as error:
            assert f"{MOST_ATTEMPTS} attempts" in str(error)
            return
        assert tokens(chunks) == completion(prompt, count)
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == "length"

    async def all_of_them() -> None:
        await asyncio.gather(*(one(*each) for each in asked))

    run(all_of_them())
    assert router.stats().sampled_tokens == sum(each.sampled for each in engines)
    assert router.stats().running == 0


def test_one_that_failed_goes_on_elsewhere_with_a_seed_of_its_own() -> None:
    first, second = FailingEngine([5]), FailingEngine()
    router = Router([first, second])
    chunks = run(read(router, seed=3))
    assert tokens(chunks) == completion(PROMPT, 12)
    assert second.prompts == [PROMPT + completion(PROMPT, 5)]


def test_an_engine_that_dies_behind_the_last_token_ends_the_generation() -> None:
    last = completion(PROMPT, 4)[-1]
    endings: list[tuple[dict[str, Any], str]] = [({"max_tokens": 4}, "length"), ({"stop_token_ids": (last,)}, "stop")]
    for asked, reason in endings:

        class Forgetful(FailingEngine):
            async def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
                self, prompt_ids: Any, params: SamplingParams
            ) -> Any:
                async for chunk in super().generate(prompt_ids, params):
                    if chunk.finish_reason is None:
                        yield chunk
                    else:
                        yield GenerationChunk(chunk.token_ids, chunk.logprobs, chunk.versions)
                        raise EngineError("it died before it said why it stopped")

        chunks = run(read(Router([Forgetful(), FailingEngine()]), PROMPT, **asked))
        assert tokens(chunks) == completion(PROMPT, 4)
        assert chunks[-1].finish_reason == reason


def test_what_is_wrong_with_the_request_is_not_tried_elsewhere() -> None:
    engines = [FailingEngine(), FailingEngine()]
    with pytest.raises(ContextLengthError):
        run(read(Router(engines), [1] * CONTEXT))
    assert not any(each.prompts for each in engines)


def test_a_request_that_every_engine_fails_ends_with_all_reasons() -> None:
    engines = [FailingEngine([0] * 9), FailingEngine([0] * 9)]
    with pytest.raises(EngineError, match=r"5 attempts: engine [01]: it was told to fail; engine [01]: it was told"):
        run(read(Router(engines)))
    assert run(read(Router([FailingEngine()]))), "the next request is served"


def test_when_all_are_gone_it_waits_for_one_to_come_back() -> None:
    async def check() -> None:
        engines = [FailingEngine(), FailingEngine()]
        router = Router(engines, patience_s=5.0)
        await router.stop()
        waiting = asyncio.create_task(read(router))
        await asyncio.sleep(0.05)
        engines[1].dead = False
        chunks = await waiting
        assert tokens(chunks) == completion(PROMPT, 12)
        assert chunks[0] == GenerationChunk(), "it told that it waits"

    run(check())


def test_it_says_that_none_came_back() -> None:
    engine = FailingEngine()
    router = Router([engine], patience_s=0.01)
    router._members[0].draining = True
    with pytest.raises(EngineError, match=r"no engine came back within 0\.01 s \(engine 0: draining\)"):
        run(read(router))


def test_a_conversation_stays_where_its_prefix_is() -> None:
    async def check() -> None:
        engines = [FailingEngine() for _ in range(4)]
        for each in engines:
            each.context_length = 10_000
        router = Router(engines)

        async def agent(number: int) -> None:
            history = [number + 1] * BLOCK_TOKENS
            for _ in range(6):
                answer = tokens(await read(router, history, max_tokens=4))
                history = history + answer + [number + 1] * BLOCK_TOKENS

        await asyncio.gather(*(agent(number) for number in range(24)))
        for number in range(24):
            homes = {place for place, each in enumerate(engines) for prompt in each.prompts if prompt[0] == number + 1}
            assert len(homes) == 1, f"agent {number} was at {homes}"
        loads = [len(each.prompts) for each in engines]
        assert min(loads) >= 24, f"the load is uneven: {loads}"

    run(check())


def test_a_prefix_that_all_share_does_not_overload_one_engine() -> None:
    async def check() -> None:
        engines = [FailingEngine() for _ in range(4)]
        router = Router(engines)
        shared = [7] * (2 * BLOCK_TOKENS)
        most = [0] * 4

        async def one(number: int) -> None:
            await asyncio.sleep(0.001 * number)
            async for _ in router.generate([*shared, number], SamplingParams(max_tokens=100)):
                for place, each in enumerate(engines):
                    most[place] = max(most[place], each.running)

        for each in engines:
            each.held.clear()
        waiting = asyncio.gather(*(one(number) for number in range(40)))
        await asyncio.sleep(0.1)
        assert max(each.running for each in engines) <= 1.25 * 10 + 5
        for each in engines:
            each.held.set()
        await waiting

    run(check())


def test_after_a_switch_nothing_new_goes_to_an_engine_with_old_weights() -> None:
    async def check() -> None:
        engines = [FailingEngine(), FailingEngine()]
        router = Router(engines)
        engines[1].refuses = [EngineError("not now"), EngineError("not yet")]
        await router.update_weights(version(1))
        assert router.version == 1
        for number in range(10):
            chunks = await read(router, [number + 1])
            assert {each for chunk in chunks for each in chunk.versions} == {1}
        while engines[1].version != 1:
            await asyncio.sleep(0.001)

    run(check())


def test_a_difference_to_weights_that_one_does_not_have_is_told() -> None:
    async def check() -> None:
        engines = [FailingEngine(), FailingEngine()]
        router = Router(engines)
        await router.update_weights(version(1))
        engines[0].version = 0  # started again
        with pytest.raises(StaleBaseError):
            await router.update_weights(version(2, base=1))
        await router.update_weights(version(2))
        assert [each.version for each in engines] == [2, 2]

    run(check())


def test_weights_that_nobody_adopts_are_an_error() -> None:
    async def check() -> None:
        engines = [FailingEngine(), FailingEngine()]
        for each in engines:
            each.refuses = [EngineError("no")]
        with pytest.raises(EngineError, match=r"no engine could adopt version 1: engine 0: no; engine 1: no"):
            await Router(engines).update_weights(version(1))

    run(check())


def test_a_drained_engine_gets_nothing_new_and_loses_nothing() -> None:
    async def check() -> None:
        engines = [FailingEngine(), FailingEngine()]
        router = Router(engines)
        engines[0].held.clear()
        under_way = [asyncio.create_task(read(router, [number])) for number in range(1, 7)]
        await asyncio.sleep(0.01)
        assert engines[0].running
        with pytest.raises(DeadlineError, match=r"engine 0 still has \d generations"):
            await router.drain(0, timeout_s=0.01)
        before = len(engines[0].prompts)
        await asyncio.gather(*(read(router, [number]) for number in range(50, 60)))
        assert len(engines[0].prompts) == before
        engines[0].held.set()
        assert await router.drain(0, timeout_s=5.0) is engines[0]
        for number, each in enumerate(under_way, 1):
            assert tokens(await each) == completion([number], 12)
        assert list(router.engines) == [1]
        assert router.stats().sampled_tokens == 16 * 12, "what it sampled stays counted"
        assert router.add(FailingEngine()) == 2
        with pytest.raises(EngineError, match="there is no engine 0"):
            await router.drain(0, timeout_s=1.0)

    run(check())


def test_an_engine_that_is_added_gets_the_newest_weights() -> None:
    async def check() -> None:
        router = Router([FailingEngine()])
        await router.update_weights(version(3))
        late = FailingEngine()
        router.add(late)
        while late.version != 3:
            await asyncio.sleep(0.001)

    run(check())


def test_a_reader_that_goes_ends_the_generation() -> None:
    async def check() -> None:
        engine = FailingEngine()
        router = Router([engine])
        generation = router.generate(PROMPT, SamplingParams(max_tokens=100))
        async for _ in generation:
            break
        await generation.aclose()  # type: ignore[attr-defined]
        assert engine.running == 0 and router.stats().running == 0
        assert engine.sampled <= 2

    run(check())


def test_affinity_is_bounded() -> None:
    import numpy as np

    affinity = Affinity(most_blocks=10)
    for number in range(100):
        affinity.learn(np.full(3 * BLOCK_TOKENS, number), owner=1)
    assert len(affinity._owners) == 10
    assert affinity.longest(np.full(3 * BLOCK_TOKENS, 99), {1}) == 1
    assert affinity.longest(np.full(3 * BLOCK_TOKENS, 99), {2}) is None
    assert affinity.longest(np.full(3 * BLOCK_TOKENS, 5), {1}) is None
