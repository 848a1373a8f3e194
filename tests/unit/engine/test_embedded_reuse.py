"""Whatever comes, whoever leaves early and whenever weights change: reuse never changes an answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.tiny_modules import tiny_module
from upspiral.config.models import EngineConfig
from upspiral.engine.base import EngineStats
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.types import SamplingParams
from upspiral.weights.load import LoadedModel

VOCABULARY, CONTEXT = 60, 192


@dataclass(frozen=True)
class Arrival:
    """A prompt is the first `shared` tokens of a trunk and then `own` tokens of its own."""

    trunk: int
    shared: int
    own: int
    seed: int
    max_tokens: int
    leaves_after: int | None
    turns: int


ARRIVALS = st.builds(
    Arrival,
    trunk=st.integers(0, 1),
    shared=st.sampled_from([0, 5, 20, 60, 90]),
    own=st.integers(1, 20),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 16),
    leaves_after=st.none() | st.integers(0, 8),
    turns=st.integers(1, 3),
)


def _model() -> LoadedModel:
    # Heads of 32, so that the compiled layers compute it where there are some.
    module = tiny_module("llama", vocab_size=VOCABULARY, head_dim=32, max_position_embeddings=CONTEXT)
    return LoadedModel.from_module(module)


def _ids(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Answer:
    prompt: list[int]
    seed: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


@dataclass
class Play:
    """An engine, what it answered so far, and the weights of each version."""

    engine: EmbeddedEngine
    model: LoadedModel
    answers: list[Answer] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)

    async def turn(self, prompt: list[int], arrival: Arrival) -> list[int]:
        answer = Answer(prompt, seed=arrival.seed)
        self.answers.append(answer)
        stream = self.engine.generate(prompt, SamplingParams(max_tokens=arrival.max_tokens, seed=arrival.seed))
        async for chunk in stream:
            answer.ids += chunk.token_ids
            answer.logprobs += chunk.logprobs
            answer.versions += chunk.versions
            if arrival.leaves_after is not None and len(answer.ids) > arrival.leaves_after:
                await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
                break
        return answer.ids

    async def rollout(self, arrival: Arrival) -> None:
        prompt = _ids(90, arrival.trunk)[: arrival.shared] + _ids(arrival.own, 10 + arrival.seed)
        for _ in range(arrival.turns):
            prompt = prompt + await self.turn(prompt, arrival) + _ids(5, arrival.seed)

    def keep_weights(self) -> None:
        self.weights.append({name: value.clone() for name, value in self.model.module.state_dict().items()})

    async def publish(self, versions: int, *, change: float) -> None:
        """So many publications, a few tokens apart."""
        for version in range(1, versions + 1):
            sampled = self.engine.stats().sampled_tokens
            for _ in range(20):
                if self.engine.stats().sampled_tokens > sampled + 15:
                    break
                await asyncio.sleep(0.002)
            await self.engine.exclusive(lambda version=version: self._update(version, change))

    def _update(self, version: int, change: float) -> None:
        generator = torch.Generator().manual_seed(version)
        for parameter in self.model.module.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=change)
        self.keep_weights()
        self.engine.publish(version, recompute=True)

    def check_books(self, stats: EngineStats, *, nobody_left: bool) -> None:
        count = stats.extra
        gone = count["evicted_tokens"] + count["outdated_tokens"] + count["lost_tokens"]
        assert count["held_tokens"] == count["computed_tokens"] + count["copied_tokens"] - gone
        assert 0 <= count["referenced_tokens"] <= count["held_tokens"]
        assert stats.running + stats.waiting > 0 or count["referenced_tokens"] == 0
        if nobody_left and stats.running + stats.waiting == 0:
            prompts = sum(len(answer.prompt) for answer in self.answers)
            assert stats.prefilled_tokens + stats.reused_tokens == prompts + count["recomputed_tokens"]


async def _play(
    model: LoadedModel, arrivals: list[Arrival], config: EngineConfig, publications: int, change: float
) -> Play:
    play = Play(EmbeddedEngine(model, config, seed=0), model)
    play.keep_weights()
    nobody_left = all(arrival.leaves_after is None for arrival in arrivals)
    await play.engine.start()
    try:
        async with asyncio.timeout(60):
            everyone = asyncio.gather(*(play.rollout(a) for a in arrivals), play.publish(publications, change=change))
            while not everyone.done() or play.engine.stats().running + play.engine.stats().waiting:
                play.check_books(await play.engine.exclusive(play.engine.stats), nobody_left=False)
                await asyncio.sleep(0.002)
            await everyone
            play.check_books(await play.engine.exclusive(play.engine.stats), nobody_left=nobody_left)
    finally:
        await play.engine.stop()
    return play


def _sizes(running: int, spare: int, *, exact: bool = False) -> EngineConfig:
    slots = running + spare
    return EngineConfig(max_running=running, cache_slots=slots, context_length=CONTEXT, prefill_tokens=32, exact=exact)


@settings(max_examples=25, deadline=None)
@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=12),
    running=st.integers(1, 5),
    spare=st.integers(0, 4),
    publications=st.integers(0, 3),
)
def test_every_logprob_is_that_of_its_versions_weights(
    arrivals: list[Arrival], running: int, spare: int, publications: int
) -> None:
    model = _model()
    play = asyncio.run(_play(model, arrivals, _sizes(running, spare), publications, change=0.05))
    for version, weights in enumerate(play.weights):
        model.module.load_state_dict(weights)
        for answer in play.answers:
            chosen = torch.tensor(answer.versions, dtype=torch.int64) == version
            if chosen.any():
                with torch.no_grad():
                    logits = model.module(torch.tensor([answer.prompt + answer.ids])).logits[0]
                expected = torch.log_softmax(logits[len(answer.prompt) - 1 : -1], -1)
                expected = expected.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
                given_logprobs = torch.tensor(answer.logprobs)
                torch.testing.assert_close(given_logprobs[chosen], expected[chosen], rtol=0, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=8),
    running=st.integers(1, 5),
    spare=st.integers(0, 4),
    publications=st.integers(0, 2),
)
def test_exact_answers_are_those_of_an_engine_without_a_cache(
    arrivals: list[Arrival], running: int, spare: int, publications: int
) -> None:
    """Bit for bit, and token for token. The publications change no weight here."""
    play = asyncio.run(_play(_model(), arrivals, _sizes(running, spare, exact=True), publications, change=0.0))

    async def cold() -> None:
        engine = EmbeddedEngine(_model(), _sizes(1, 0, exact=True), seed=0)
        await engine.start()
        try:
            for version, answer in enumerate(play.answers):
                engine.publish(version)
                if answer.ids:
                    params = SamplingParams(max_tokens=len(answer.ids), seed=answer.seed)
                    chunks = [chunk async for chunk in engine.generate(answer.prompt, params)]
                    assert [chunk.token_ids[0] for chunk in chunks] == answer.ids
                    assert [chunk.logprobs[0] for chunk in chunks] == answer.logprobs
            assert engine.stats().reused_tokens == 0
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(cold(), 60))
