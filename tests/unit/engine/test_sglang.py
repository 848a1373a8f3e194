"""Our client of SGLang against its contract (tests/fixtures/sglang_contract.py), not against its server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.publishing_trainer import PublishingTrainer as Trainer
from tests.fixtures.sglang_contract import CONTEXT, EXPERTS_OF_TOKEN, SglangContract
from upspiral.config.models import RunConfig
from upspiral.engine.base import GenerationChunk
from upspiral.engine.routed_layers import RoutedLayers
from upspiral.engine.router import Router
from upspiral.engine.sglang.client import SglangEngine
from upspiral.errors import ContextLengthError, EngineError, RequestError, StaleBaseError, UnknownWeightsError
from upspiral.loop.servers import Machine, servers
from upspiral.types import SamplingParams
from upspiral.weights.probe import measured_probe

PROMPT = [5, 17, 80, 41, 9, 120, 3]
FORMS: dict[str, dict[str, Any]] = {
    "all so far": {},
    "two at a time": {"interval": 2, "retracts": True},
    "only the new": {"incremental": True, "interval": 3},
}


@asynccontextmanager
async def running(contract: SglangContract, **options: Any) -> AsyncIterator[SglangEngine]:
    async with contract.serving() as url:
        engine = SglangEngine(url, probe_tolerance=0.005, **options)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()


class Sample:
    """A whole generation."""

    def __init__(self, chunks: list[GenerationChunk]) -> None:
        self.chunks = [chunk for chunk in chunks if chunk.token_ids or chunk.finish_reason]
        self.held_back = len(chunks) - len(self.chunks)
        """Chunks that told of work and nothing of it."""
        self.ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        self.logprobs = [logprob for chunk in chunks for logprob in chunk.logprobs]
        self.versions = [version for chunk in chunks for version in chunk.versions]
        self.kept = [kept for chunk in chunks for kept in chunk.kept_ids]
        assert len(self.ids) == len(self.logprobs) == len(self.versions)
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        self.finish = chunks[-1].finish_reason


async def sampled(engine: Any, **params: Any) -> Sample:
    asked = SamplingParams(**{"max_tokens": 20, **params})
    return Sample([chunk async for chunk in engine.generate(PROMPT, asked)])


def plain(trainer: Trainer, ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """[T, vocabulary] log-probabilities of each of `ids` behind the prompt."""
    with torch.no_grad():
        logits = trainer.module(input_ids=torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
    return (logits / temperature).log_softmax(-1).numpy()


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer("llama", tmp_path / "model")


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(200):
            await work()

    asyncio.run(within())


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("form", FORMS)
def test_every_token_comes_once_with_its_logprob_and_version(trainer: Trainer, form: str) -> None:
    async def check() -> None:
        async with running(SglangContract(trainer.folder, **FORMS[form]), version=7) as engine:
            assert engine.context_length == CONTEXT
            for temperature in (1.0, 0.7, 0.0):
                sample = await sampled(engine, temperature=temperature, seed=1)
                assert len(sample.ids) == 20 and sample.versions == [7] * 20 and sample.finish == "length"
                expected = plain(trainer, sample.ids, temperature or 1.0)[range(20), sample.ids]
                np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
            stats = engine.stats()
            assert (stats.sampled_tokens, stats.running) == (60, 0)
            assert stats.prefilled_tokens + stats.reused_tokens == 3 * len(PROMPT)
            assert stats.reused_tokens >= 2 * (len(PROMPT) - 1)

    run(check)


@pytest.mark.parametrize("form", FORMS)
def test_it_ends_at_its_own_stop_tokens_and_not_at_the_models(trainer: Trainer, form: str) -> None:
    async def check() -> None:
        async with running(SglangContract(trainer.folder)) as engine:
            greedy = (await sampled(engine, temperature=0.0)).ids
        stop, foreign = greedy[9], greedy[4]
        place = greedy.index(stop)
        assert greedy.index(foreign) < place
        async with running(SglangContract(trainer.folder, eos=(foreign,), **FORMS[form])) as engine:
            sample = await sampled(engine, temperature=0.0, stop_token_ids=(stop,))
            assert sample.ids == greedy[: place + 1] and sample.finish == "stop"
            sample = await sampled(engine, temperature=0.0)
            assert sample.ids == greedy and sample.finish == "length"

    run(check)


@pytest.mark.parametrize("form", FORMS)
def test_logprobs_of_filters_are_of_what_they_leave(trainer: Trainer, form: str) -> None:
    async def check() -> None:
        async with running(SglangContract(trainer.folder, **FORMS[form])) as engine:
            sample = await sampled(engine, temperature=0.8, top_k=20, top_p=0.8, list_kept=True)
            rows = plain(trainer, sample.ids, 0.8)
            assert len(sample.kept) == 20
            for row, token, logprob, kept in zip(rows, sample.ids, sample.logprobs, sample.kept, strict=True):
                assert kept is not None and token in kept and 1 <= len(kept) <= 20
                assert list(kept) == sorted(kept)
                assert logprob == pytest.approx(row[token] - np.logaddexp.reduce(row[kept]), abs=1e-4)
            assert not (await sampled(engine, top_k=20)).kept
            assert (await sampled(engine, list_kept=True)).kept == [None] * 20
            with pytest.raises(RequestError, match="return_sampling_mask requires"):
                await sampled(engine, top_p=0.9)
        async with running(SglangContract(trainer.folder, masks=False)) as engine:
            with pytest.raises(RequestError, match="use a newer server"):
                await sampled(engine, top_k=20)

    run(check)


@pytest.mark.parametrize("form", FORMS)
def test_a_switch_of_weights_loses_no_token_and_mislabels_none(trainer: Trainer, form: str, tmp_path: Path) -> None:
    async def check() -> None:
        async with running(SglangContract(trainer.folder, **FORMS[form])) as engine:
            before = Trainer("llama", tmp_path / "before")
            under_way = [asyncio.create_task(sampled(engine, max_tokens=40, seed=seed)) for seed in range(5)]
            await until(lambda: engine.stats().sampled_tokens >= 5 * 8)
            trainer.change()
            await engine.update_weights(trainer.publish(1))
            assert engine.version == 1 and engine.stats().extra["probes"] == 1
            crossed = 0
            for task in under_way:
                sample = await task
                assert len(sample.ids) == 40 and sample.finish == "length"
                assert sample.versions == sorted(sample.versions) and set(sample.versions) <= {0, 1}
                crossed += len(set(sample.versions)) == 2
                by_version = [plain(before, sample.ids), plain(trainer, sample.ids)]
                expected = [by_version[v][at, sample.ids[at]] for at, v in enumerate(sample.versions)]
                np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
            assert crossed >= 3, "most were in the middle of it"
            assert set((await sampled(engine)).versions) == {1}
            assert engine.stats().sampled_tokens == 5 * 40 + 20
            await engine.update_weights(trainer.publish(1))  # again: nothing happens
            assert engine.stats().extra["probes"] == 1

    run(check)


def test_a_reader_who_is_slow_gets_old_tokens_under_the_old_version(trainer: Trainer) -> None:
    async def check() -> None:
        contract = SglangContract(trainer.folder)
        async with running(contract) as engine:
            chunks = engine.generate(PROMPT, SamplingParams(max_tokens=30))
            first = await anext(chunks)  # type: ignore[call-overload]
            await until(lambda: any(len(each.sampled) > 10 for each in contract.requests.values()))
            trainer.change()
            await engine.update_weights(trainer.publish(1))
            sample = Sample([first, *[chunk async for chunk in chunks]])
            assert len(sample.ids) == 30 and sample.versions == sorted(sample.versions)
            assert sample.versions.count(0) > 10 and set(sample.versions) == {0, 1}

    run(check)


def test_weights_that_were_not_adopted_are_noticed(trainer: Trainer, tmp_path: Path) -> None:
    async def check() -> None:
        async with running(SglangContract(trainer.folder)) as engine:
            published = trainer.publish(1)
            broken = type(published)(tmp_path / "nowhere", 1, None, 0)
            with pytest.raises(EngineError, match=r"could not adopt version 1: .*nowhere"):
                await engine.update_weights(broken)
            with pytest.raises(EngineError, match=r"nobody knows which weights it has: .*could not adopt version 1"):
                await sampled(engine)
            await engine.update_weights(published)
            assert set((await sampled(engine)).versions) == {1}
            with pytest.raises(StaleBaseError, match=r'weights\.form = "full"'):
                await engine.update_weights(type(published)(published.folder, 2, 1, 0))
            tensors = [(name, tensor.clone()) for name, tensor in trainer.module.named_parameters()]
            trainer.change()
            wrong = trainer._publisher.publish(tensors, 2, trainer.settings, probe=measured_probe(trainer.module))
            for _ in range(2):
                with pytest.raises(EngineError, match="answers as if it had not adopted version 2"):
                    await engine.update_weights(wrong)
                with pytest.raises(EngineError, match="nobody knows which weights it has"):
                    await sampled(engine)
            await engine.update_weights(trainer.publish(3))
            assert set((await sampled(engine)).versions) == {3}

    run(check)


def test_weights_that_somebody_else_changed_are_noticed(trainer: Trainer) -> None:
    async def check() -> None:
        contract = SglangContract(trainer.folder)
        async with running(contract) as engine:
            published = trainer.publish(1)
            await engine.update_weights(published)
            for label in ("default", "2"):
                contract.label = label
                for _ in range(2):
                    with pytest.raises(UnknownWeightsError, match=rf"weight version '{label}', but should have 1"):
                        await sampled(engine)
                await engine.update_weights(published)
                assert set((await sampled(engine)).versions) == {1}

    run(check)


def test_pauses_nest_and_what_is_under_way_goes_on_afterwards(trainer: Trainer) -> None:
    async def check() -> None:
        contract = SglangContract(trainer.folder)
        async with running(contract) as engine:
            under_way = asyncio.create_task(sampled(engine, max_tokens=40))
            await until(lambda: engine.stats().sampled_tokens >= 5)
            await engine.pause()
            await engine.pause()
            engine.resume()
            late = asyncio.create_task(sampled(engine))
            await asyncio.sleep(0.05)
            held = engine.stats().sampled_tokens
            await asyncio.sleep(0.05)
            assert engine.stats().sampled_tokens == held and not contract.requests
            engine.resume()
            assert len((await under_way).ids) == 40 and len((await late).ids) == 20

    run(check)


def test_memory_is_given_up_in_sleep_and_comes_back_with_the_next_weights(trainer: Trainer) -> None:
    async def check() -> None:
        contract = SglangContract(trainer.folder)
        async with running(contract) as engine:
            await engine.update_weights(trainer.publish(1))
            under_way = asyncio.create_task(sampled(engine, max_tokens=40))
            await until(lambda: engine.stats().sampled_tokens >= 5)
            contract.calls.clear()
            await engine.sleep()
            await engine.sleep()  # does nothing
            late = asyncio.create_task(sampled(engine))
            await asyncio.sleep(0.05)
            assert contract.released == {"kv_cache", "weights"} and not late.done()
            trainer.change()
            publication = trainer.publish(2)
            await engine.update_weights(publication)
            assert contract.calls[:8] == [
                "/pause_generation", "/release_memory_occupation kv_cache weights",
                "/pause_generation", "/resume_memory_occupation weights", "/update_weights_from_disk",
                "/resume_memory_occupation kv_cache", "/continue_generation", "/generate",
            ]  # fmt: skip
            assert engine.stats().extra["probes"] == 2
            sample = await under_way
            count = sample.versions.count(1)
            assert 5 <= count < 40 and sample.versions == [1] * count + [2] * (40 - count)
            expected = plain(trainer, sample.ids)[range(count, 40), sample.ids[count:]]
            np.testing.assert_allclose(sample.logprobs[count:], expected, atol=1e-4)
            assert (await late).versions == [2] * 20
            await engine.sleep()
            await engine.update_weights(publication)  # the version from before
            assert (await sampled(engine)).versions == [2] * 20

    run(check)


def test_an_update_that_fails_in_its_sleep_is_told_and_the_next_one_wakes_it(trainer: Trainer) -> None:
    async def check() -> None:
        contract = SglangContract(trainer.folder)
        async with running(contract) as engine:
            await engine.sleep()
            lost = trainer.publish(1)
            lost.folder.rename(trainer.folder / "gone")
            with pytest.raises(EngineError, match="could not adopt version 1"):
                await engine.update_weights(lost)
            with pytest.raises(EngineError, match="could not adopt version 1"):
                await sampled(engine)
            assert contract.released == {"kv_cache"}
            await engine.update_weights(trainer.publish(2))
            assert not contract.released and (await sampled(engine)).versions == [2] * 20

    run(check)


def test_a_reader_that_goes_ends_the_request(trainer: Trainer) -> None:
    async def check() -> None:
        contract = SglangContract(trainer.folder)
        async with running(contract) as engine:
            generation = engine.generate(PROMPT, SamplingParams(max_tokens=240))
            async for _ in generation:
                break
            assert contract.requests
            await generation.aclose()  # type: ignore[attr-defined]
            assert engine.stats().running == 0
            await until(lambda: not contract.requests)
            assert len(contract._cached[0]) < len(PROMPT) + 100, "it ended before it was done"

    run(check)


def test_failures_say_whose_they_are(trainer: Trainer) -> None:
    async def check() -> None:
        contract = SglangContract(trainer.folder)
        async with running(contract) as engine:
            with pytest.raises(ContextLengthError, match="300 tokens"):
                await anext(engine.generate([1] * 300, SamplingParams(max_tokens=1)))  # type: ignore[call-overload]
            engine._context_length = 10_000  # as if ours were larger than the server's
            with pytest.raises(ContextLengthError, match="longer than the model's context length"):
                await anext(engine.generate([1] * 300, SamplingParams(max_tokens=1)))  # type: ignore[call-overload]
            with pytest.raises(RequestError, match="vocab size"):
                await anext(engine.generate([10**6], SamplingParams(max_tokens=1)))  # type: ignore[call-overload]
            contract.broken_after = 5
            with pytest.raises(EngineError, match="/generate"):
                await sampled(engine)
            contract.nan_after = 5
            with pytest.raises(EngineError, match="NaN happened"):
                await sampled(engine)
            under_way = asyncio.create_task(sampled(engine, max_tokens=200))
            await until(lambda: bool(contract.requests))
            await engine._server.post("/abort_request", {"rid": "", "abort_all": True})
            with pytest.raises(EngineError, match="Aborted by AbortReq"):
                await under_way

    run(check)


def test_routes_are_those_of_the_tokens_before(trainer: Trainer) -> None:
    async def check() -> None:
        contract = SglangContract(trainer.folder)
        layout = RoutedLayers(layers=3, with_experts=(0, 2), experts_of_token=EXPERTS_OF_TOKEN)
        async with running(contract, routes=layout) as engine:
            sample = await sampled(engine)
            chunks = sample.chunks
            assert len(chunks) == 1 and sample.held_back > 3, "SGLang tells them at the end"
            expected = contract.experts([*PROMPT, *sample.ids[:-1]])[:, [0, 2]]
            np.testing.assert_array_equal(chunks[0].prompt_routes, expected[: len(PROMPT) - 1])
            np.testing.assert_array_equal(chunks[0].routes, expected[len(PROMPT) - 1 :])
            under_way = asyncio.create_task(sampled(engine, max_tokens=40))
            await until(lambda: any(len(each.sampled) > 5 for each in contract.requests.values()))
            await engine.pause()
            engine.resume()
            sample = await under_way
            assert len(sample.chunks) == 2 and len(sample.ids) == 40
            assert sample.chunks[1].prompt_routes is None
            routes = np.concatenate([chunk.routes for chunk in sample.chunks if chunk.routes is not None])
            expected = contract.experts([*PROMPT, *sample.ids[:-1]])[:, [0, 2]]
            np.testing.assert_array_equal(routes, expected[len(PROMPT) - 1 :])

    run(check)


def test_a_run_that_replays_routes_asks_its_servers_for_them(trainer: Trainer, tmp_path: Path) -> None:
    """Its model's second layer of three has no experts."""
    model, contract = tmp_path / "mixture", SglangContract(trainer.folder)
    model.mkdir()
    shape = {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": EXPERTS_OF_TOKEN, "mlp_only_layers": [1]}
    (model / "config.json").write_text(json.dumps(shape))

    async def check() -> None:
        async with contract.serving() as url:
            engine = {"kind": "sglang", "routes": "replay", "context_length": 64, "server": {"urls": [url]}}
            config = RunConfig.model_validate({"agent": {"command": "true"}, "engine": engine})
            router = servers(config, model, tmp_path / "logs", Machine(cpu=True, threads=1))
            await router.start()
            try:
                await router.update_weights(trainer.publish(0))
                sample = await sampled(router)
            finally:
                await router.stop()
        expected = contract.experts([*PROMPT, *sample.ids[:-1]])[:, [0, 2]]
        np.testing.assert_array_equal(sample.chunks[0].prompt_routes, expected[: len(PROMPT) - 1])
        np.testing.assert_array_equal(sample.chunks[0].routes, expected[len(PROMPT) - 1 :])

    run(check)


def test_two_servers_behind_a_router_where_one_breaks(trainer: Trainer) -> None:
    async def check() -> None:
        contracts = [SglangContract(trainer.folder, **FORMS[form]) for form in ("all so far", "only the new")]
        async with running(contracts[0]) as first, running(contracts[1]) as second:
            router = Router([first, second])
            await router.update_weights(trainer.publish(1))
            for contract in contracts:
                contract.broken_after = 4
            samples = await asyncio.gather(*(sampled(router, seed=seed) for seed in range(6)))
            for sample in samples:
                assert len(sample.ids) == 20 and sample.versions == [1] * 20
                expected = plain(trainer, sample.ids)[range(20), sample.ids]
                np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
            assert router.stats().sampled_tokens == 120

    run(check)
