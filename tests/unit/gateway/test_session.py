"""What counts as a call, which seed it samples with, and what a retry may join."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fixtures.tiny_model import make_tokenizer
from upspiral.engine.base import GenerationChunk, TokenIds
from upspiral.engine.scripted import ScriptedEngine, ScriptLine
from upspiral.errors import ContextLengthError, DeadlineError, LedgerError, SealedRolloutError
from upspiral.gateway.call import HungUpError
from upspiral.gateway.hints import Hints
from upspiral.gateway.metrics import GatewayMetrics
from upspiral.gateway.request import AnswerRequest, SessionPolicy
from upspiral.gateway.session import REMEMBERED_CALLS, MaxCallsError, Room, Session
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Edge, Message, Rollout, SamplingParams


class StuckEngine(ScriptedEngine):
    """Does not let go of what it is told to stop."""

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        try:
            async for chunk in super().generate(prompt_ids, params):
                yield chunk
        finally:
            await asyncio.sleep(60)


class HoldingEngine(ScriptedEngine):
    """Tells that it works, and nothing of what it sampled until the end."""

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        chunks = []
        async for chunk in super().generate(prompt_ids, params):
            await asyncio.sleep(0.4)
            chunks.append(chunk)
            yield GenerationChunk()
        for chunk in chunks:
            yield chunk


@asynccontextmanager
async def a_session(
    folder: Path, policy: SessionPolicy, pause_s: float = 0.0, kind: type[ScriptedEngine] = ScriptedEngine
) -> AsyncIterator[tuple[Session, ScriptedEngine]]:
    renderer = Renderer.from_folder(make_tokenizer(folder / "model"))
    engine = kind(
        [ScriptLine(text="one two three")] * 8, encode=renderer.encode_answer, context_length=100, pause_s=pause_s
    )
    store = TrajectoryStore(folder / "trajectories.db")
    rollout = Rollout("r1", "task", "group")
    store.create_rollout(rollout)
    session = Session(Room(renderer, engine, store, GatewayMetrics()), rollout, policy)
    try:
        yield session, engine
    finally:
        await session.seal()
        store.close()


def asked(text: str, model: str = "main") -> AnswerRequest:
    return AnswerRequest((Message("user", text),), model=model)


def test_a_request_that_is_refused_costs_no_call(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy(max_calls=1)) as (session, _):
            with pytest.raises(ContextLengthError):
                session.begin(asked("much " * 200))
            await session.begin(asked("hello")).task
            with pytest.raises(MaxCallsError):
                session.begin(asked("hello again"))
            assert (await session.seal()).calls == 1

    asyncio.run(scene())


def test_side_calls_cost_no_call_and_every_call_has_a_seed_of_its_own(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy(max_calls=1, seed=7)) as (session, engine):
            for model in ("main", "small-auxiliary", "small-auxiliary"):
                await session.begin(asked("hello", model)).task
            assert len({call.params.seed for call in engine.calls}) == 3
            assert (await session.seal()).calls == 1

    asyncio.run(scene())


def test_a_retry_does_not_join_a_call_that_is_being_cancelled(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy(), pause_s=0.05) as (session, _):
            first = session.begin(asked("hello"), Hints(body_digest=b"same"))
            await asyncio.sleep(0.02)
            first.leave(HungUpError("the client left"))
            assert not first.task.done()
            again = session.begin(asked("hello"), Hints(retry=1, body_digest=b"same"))
            assert again is not first
            await again.task
            assert again.error is None and again.usage.completion_tokens > 0

    asyncio.run(scene())


def test_a_call_that_is_cancelled_before_it_began_has_an_error_and_no_answer(tmp_path: Path) -> None:
    """A request and the end of its rollout can come in the same turn of the event loop."""

    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy()) as (session, _):
            sealing = asyncio.create_task(session.seal())
            call = session.begin(asked("hello"))
            await sealing
            assert isinstance(call.error, SealedRolloutError) and not call.delivered
            with pytest.raises(SealedRolloutError):
                _ = [event async for event in call.events()]

    asyncio.run(scene())


def test_an_engine_that_does_not_let_go_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upspiral.gateway.call.CLOSE_DEADLINE_S", 0.05)

    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy(), kind=StuckEngine) as (session, _):
            # A stop string ends the answer before the engine would.
            call = session.begin(replace(asked("hello"), stop_strings=("one",)))
            await asyncio.wait_for(call.task, 5)
            assert isinstance(call.error, DeadlineError) and session.failed == str(call.error)
            assert "to let go of it; the engine is stuck" in str(session.failed)

    asyncio.run(scene())


def test_nobody_is_served_what_cannot_be_recorded(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy()) as (session, engine):
            engine.version = 2**40  # does not fit a node's
            call = session.begin(asked("hello"))
            await call.task
            assert isinstance(call.error, LedgerError) and "could not be recorded" in str(call.error)
            assert session.failed == str(call.error)

    asyncio.run(scene())


def test_a_retry_joins_its_call_however_many_others_are_in_flight(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy(), pause_s=0.02) as (session, engine):
            calls = [session.begin(asked(f"question {n}"), Hints(body_digest=b"%d" % n)) for n in range(8)]
            again = [session.begin(asked(f"question {n}"), Hints(retry=1, body_digest=b"%d" % n)) for n in range(8)]
            assert again == calls
            await asyncio.gather(*(call.task for call in calls))
            assert len(engine.calls) == 8
            assert session.begin(asked("question 7"), Hints(retry=1, body_digest=b"7")) is calls[7]

    asyncio.run(scene())


def test_only_the_newest_complete_calls_are_remembered(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy()) as (session, _):
            calls = []
            for n in range(REMEMBERED_CALLS + 2):
                calls.append(session.begin(asked(f"question {n}"), Hints(body_digest=b"%d" % n)))
                await calls[-1].task
            joined = [
                session.begin(asked(f"question {n}"), Hints(retry=1, body_digest=b"%d" % n)) is call
                for n, call in reversed([*enumerate(calls)])
            ]
            assert joined[:REMEMBERED_CALLS] == [True] * REMEMBERED_CALLS and not joined[-1]

    asyncio.run(scene())


def test_what_was_begun_before_does_not_undo_a_truncation(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy(max_calls=1), pause_s=0.02) as (session, _):
            begun = session.begin(asked("hello"))
            with pytest.raises(MaxCallsError):
                session.begin(asked("hello again"))
            await begun.task
            await session.begin(asked("a title?", "small-auxiliary")).task
            assert begun.error is None and session.truncated == "max_calls"

    asyncio.run(scene())


def test_an_agent_that_shortens_its_history_goes_on(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy()) as (session, _):
            with pytest.raises(ContextLengthError):
                session.begin(asked("much " * 200, "small-auxiliary"))
            assert session.truncated is None
            with pytest.raises(ContextLengthError):
                session.begin(asked("much " * 200))
            assert session.truncated == "context_length_exceeded"
            await session.begin(asked("little")).task
            assert session.truncated is None

    asyncio.run(scene())


def test_a_retry_of_what_never_began_has_answers_like_any_other(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy()) as (session, _):
            two = replace(asked("hello"), answers=2)
            await session.begin(two, Hints(retry=1, body_digest=b"same")).task
            assert [node.reason for node in session.graph.nodes] == ["root", "append", "sibling"]
            assert not session.graph.edges

    asyncio.run(scene())


def test_every_answer_to_a_retry_comes_from_the_one_that_never_arrived(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy(), pause_s=0.02) as (session, engine):
            lost = session.begin(asked("hello"), Hints(body_digest=b"one"))
            while engine.stats().sampled_tokens == 0:
                await asyncio.sleep(0.005)
            lost.leave(HungUpError("the client left"))
            await lost.task
            await session.begin(asked("hello"), Hints(body_digest=b"other")).task
            await session.begin(replace(asked("hello"), answers=2), Hints(retry=1, body_digest=b"two")).task
            assert [node.reason for node in session.graph.nodes] == ["root", "append", "sibling", "retry", "retry"]
            assert session.graph.edges == [Edge("retry", 1, 3, "header"), Edge("retry", 1, 4, "header")]

    asyncio.run(scene())


def test_an_answer_whose_tokens_are_held_back_may_take_longer_than_an_engine_may_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upspiral.gateway.call.CHUNK_DEADLINE_S", 1.0)

    async def scene() -> None:
        async with a_session(tmp_path, SessionPolicy(), kind=HoldingEngine) as (session, _):
            began, call = time.monotonic(), session.begin(asked("hello"))
            events = [event async for event in call.events()]
            assert sum(event.tokens for event in events) == call.usage.completion_tokens
            assert time.monotonic() - began > 1.0
            assert all(event.tokens or event.pieces or event.end for event in events)

    asyncio.run(scene())
