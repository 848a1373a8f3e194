"""The client of vLLM against its documented endpoint: what a server must not send, and switches of weights."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.vllm_contract import CONTEXT, ContractServer, NumberTrainer, chunk_of, serving
from upspiral.engine import router as router_module
from upspiral.engine.base import GenerationChunk
from upspiral.engine.routed_layers import RoutedLayers
from upspiral.engine.router import Router
from upspiral.engine.vllm.client import VllmEngine
from upspiral.errors import ContextLengthError, EngineError, RequestError, StaleBaseError, UnknownWeightsError
from upspiral.types import SamplingParams

DEADLINE_S = 20
PROMPT = [5, 17, 9]
Check = Callable[[ContractServer, VllmEngine], Awaitable[None]]


@asynccontextmanager
async def connected(**settings: Any) -> AsyncIterator[tuple[ContractServer, VllmEngine]]:
    server = ContractServer()
    async with serving(server) as url:
        engine = VllmEngine(url, **settings)
        await engine.start()
        try:
            yield server, engine
        finally:
            await engine.stop()


def run(check: Check, **settings: Any) -> None:
    async def within() -> None:
        async with asyncio.timeout(DEADLINE_S), connected(**settings) as (server, engine):
            await check(server, engine)

    asyncio.run(within())


async def read(engine: VllmEngine, **params: Any) -> list[GenerationChunk]:
    return [chunk async for chunk in engine.generate(PROMPT, SamplingParams(**{"max_tokens": 12, **params}))]


def flat(chunks: list[GenerationChunk]) -> list[tuple[int, float, int]]:
    """Token, log-probability and version of each."""
    return [row for chunk in chunks for row in zip(chunk.token_ids, chunk.logprobs, chunk.versions, strict=True)]


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.002)


def test_what_is_asked_and_what_arrives() -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        assert (engine.context_length, engine.version, server.label) == (CONTEXT, 0, "0")
        chunks = await read(engine, temperature=0.7, top_p=0.9, top_k=4, min_p=0.1, stop_token_ids=(2,), seed=3)
        assert flat(chunks) == [(token, 0.0, 0) for token in range(12)]
        assert [chunk.finish_reason for chunk in chunks] == [None] * 11 + ["length"]
        (body,) = server.asked
        asked = body["sampling_params"]
        expected = {
            "max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "stop_token_ids": [2],
            "seed": 3, "ignore_eos": True, "logprobs": 0,
        }  # fmt: skip
        assert {name: asked[name] for name in expected} == expected
        assert body["token_ids"] == PROMPT and body["cache_salt"].startswith("v0-")
        await read(engine, max_tokens=500)
        assert server.asked[-1]["sampling_params"]["max_tokens"] == CONTEXT - len(PROMPT)
        assert engine.stats().sampled_tokens == 12 + CONTEXT - len(PROMPT) and engine.stats().running == 0

    run(check)


def _without(name: str) -> dict[str, Any]:
    chunk = chunk_of([7])
    del chunk["choices"][0][name]
    return chunk


MALFORMED: Mapping[str, Mapping[str, Any] | bytes] = {
    "no JSON": b"{",
    "a list": b"[1]",
    "null": b"null",
    "no choices": {"choices": []},
    "no reason": _without("finish_reason"),
    "no log-probabilities": _without("logprobs"),
    "null log-probabilities": chunk_of([7], logprobs=None),
    "too few log-probabilities": chunk_of([7], logprobs={"content": []}),
    "those of another token": chunk_of([7], logprobs={"content": [{"token_id": 8, "logprob": -1.0}]}),
    "an absent log-probability": chunk_of([7], -9999.0),
    "a text as log-probability": chunk_of([7], logprobs={"content": [{"token_id": 7, "logprob": "x"}]}),
    "a negative token": chunk_of([-1]),
    "a text as token": chunk_of([7], token_ids=["7"]),
    "labels with holes": chunk_of([7], finish_reason="stop", weight_versions=[{"version": "0", "start": 1, "end": 1}]),
    "an abort": chunk_of([], finish_reason="abort"),
    "an unknown reason": chunk_of([7], finish_reason="tired"),
    "a failure": {"error": {"message": "the engine died", "code": 500}},
    "a failure without a code": {"error": "the engine died"},
    "routes that are none": chunk_of([7], finish_reason="stop", routed_experts="?"),
}


@pytest.mark.parametrize("line", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_chunk_is_an_engine_error_and_the_next_generation_works(line: Mapping[str, Any] | bytes) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        server.script = [[chunk_of([4]), line]]
        delivered: list[int] = []
        with pytest.raises(EngineError):
            async for chunk in engine.generate(PROMPT, SamplingParams(max_tokens=9)):
                delivered += chunk.token_ids
        assert delivered == [4], "nothing of the wrong chunk"
        assert len(flat(await read(engine))) == 12
        assert engine.stats().running == 0

    run(check)


def test_a_stream_that_ends_early_is_an_engine_error() -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        for ending in ([], [b"[DONE]"]):
            server.script = [[chunk_of([4]), *ending]]
            with pytest.raises(EngineError, match="without saying why"):
                await read(engine)

    run(check)


def test_refusals_are_the_readers_and_failures_the_engines() -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        with pytest.raises(ContextLengthError, match=f"the prompt has {CONTEXT} tokens"):
            await anext(aiter(engine.generate([1] * CONTEXT, SamplingParams(max_tokens=1))))
        with pytest.raises(RequestError, match="must be at least 1"):
            await anext(aiter(engine.generate([], SamplingParams(max_tokens=1))))
        assert not server.asked
        path = "/inference/v1/generate"
        server.answers[path] = 400, "This model's maximum context length is 5 tokens"
        with pytest.raises(ContextLengthError, match="maximum context length is 5"):
            await read(engine)
        server.answers[path] = 500, "the engine died"
        with pytest.raises(EngineError, match="answered 500: the engine died"):
            await read(engine)
        del server.answers[path]
        server.script = [[{"error": {"message": "token 1000000 is out of vocabulary", "code": 400}}]]
        with pytest.raises(RequestError, match="out of vocabulary"):
            await read(engine)

    run(check)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_reader_that_goes_frees_its_generation_in_the_server(how: str) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        server.pause_s = 0.05
        if how == "close":
            generation = engine.generate(PROMPT, SamplingParams(max_tokens=50))
            await anext(aiter(generation))
            await generation.aclose()  # type: ignore[attr-defined]
        else:
            task = asyncio.create_task(read(engine, max_tokens=50))
            await until(lambda: engine.stats().sampled_tokens > 0)
            task.cancel()
        await until(lambda: server.running == 0)
        assert engine.stats().running == 0 and engine.stats().sampled_tokens < 50

    run(check)


def test_tokens_of_a_switch_carry_the_version_that_sampled_them(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        trainer = NumberTrainer(tmp_path)
        under_way = [asyncio.create_task(read(engine, max_tokens=60)) for _ in range(4)]
        for version in (1, 2):
            await until(lambda goal=version * 40: engine.stats().sampled_tokens > goal)
            await engine.update_weights(trainer.publish(version, 10.0 * version))
            assert engine.version == version
        seen = set()
        for task in under_way:
            rows = flat(await task)
            assert [token for token, _, _ in rows] == list(range(60)), "none is lost"
            assert all(logprob == -10.0 * version for _, logprob, version in rows)
            seen |= {version for _, _, version in rows}
        assert seen == {0, 1, 2}
        await engine.update_weights(trainer.publish(2, 99.0))
        assert flat(await read(engine))[0] == (0, -20.0, 2), "the same version again does nothing"
        assert server.asked[-1]["cache_salt"].startswith("v2-")
        assert engine.stats().extra == {"probes": 2.0, "probe_mismatch": 0.0}

    run(check)


@pytest.mark.parametrize("paused", [False, True])
def test_weights_that_were_not_adopted_are_noticed_and_nothing_is_sampled_from_them(
    paused: bool, tmp_path: Path
) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        trainer = NumberTrainer(tmp_path)
        server.keeps_old_weights = True
        under_way = asyncio.create_task(read(engine, max_tokens=50))
        await until(lambda: engine.stats().sampled_tokens > 5)
        if paused:
            await engine.pause()
            await engine.update_weights(trainer.publish(1, 10.0))
            engine.resume()
        else:
            with pytest.raises(EngineError, match="as if it had not adopted version 1"):
                await engine.update_weights(trainer.publish(1, 10.0))
        with pytest.raises(EngineError, match="version 1"):
            await under_way
        with pytest.raises(EngineError, match="version 1"):
            await read(engine)
        server.keeps_old_weights = False
        await engine.update_weights(trainer.publish(1, 10.0))
        assert {row[1:] for row in flat(await read(engine))} == {(-10.0, 1)}

    run(check)


def test_cached_keys_and_values_are_those_of_one_adoption_by_one_client(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        published, other = NumberTrainer(tmp_path).publish(4, 40.0), VllmEngine(engine.url)
        await other.start()  # of a second run, or of one that is resumed
        for client in (engine, other):
            await client.update_weights(published)
            for _ in range(2):
                await read(client)
        server.label = "default"
        with pytest.raises(UnknownWeightsError):
            await read(other)
        await other.update_weights(published)
        await read(other)
        await other.stop()
        salts = [body["cache_salt"] for body in server.asked if body["stream"]]
        assert all(salt.startswith("v4-") for salt in salts)
        first, second, third = dict.fromkeys(salts)
        assert salts == [first] * 2 + [second] * 3 + [third]

    run(check)


@pytest.mark.parametrize("label", ["default", "3", "-1", "6"])
def test_nothing_is_told_of_weights_that_the_server_calls_otherwise(label: str, tmp_path: Path) -> None:
    """As one does that its own supervisor started again."""

    async def check(server: ContractServer, engine: VllmEngine) -> None:
        seventh = NumberTrainer(tmp_path).publish(7, 70.0)
        await engine.update_weights(seventh)
        assert {row[1:] for row in flat(await read(engine))} == {(-70.0, 7)}
        server.value, server.label = 0.0, label
        for _ in range(2):
            with pytest.raises(UnknownWeightsError, match=rf"has version 7 and labels its weights \['{label}'\]"):
                await anext(aiter(engine.generate(PROMPT, SamplingParams(max_tokens=12))))
        await engine.update_weights(seventh)
        assert {row[1:] for row in flat(await read(engine))} == {(-70.0, 7)}

    run(check)


def test_labels_of_other_weights_at_the_end_are_the_last_that_is_believed() -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        server.pause_s = 0.02
        under_way = [asyncio.create_task(read(engine, max_tokens=count)) for count in (6, 60)]
        await until(lambda: engine.stats().sampled_tokens > 4)
        server.label = "default"
        for each in under_way:
            with pytest.raises(UnknownWeightsError, match=r"labels its weights \['0', 'default'\]"):
                await each
        assert engine.stats().sampled_tokens < 30, "the longer one ended with the other"

    run(check)


def test_generations_that_begin_together_ask_for_the_label_together() -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        server.label_pause_s = 0.3
        server.calls.clear()
        many = await asyncio.gather(*(read(engine) for _ in range(16)))
        assert [len(flat(chunks)) for chunks in many] == [12] * 16
        assert server.calls.count("/weight_info") < 6

    run(check)


def test_weights_may_be_switched_while_the_server_is_asked_for_its_label(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        server.label_pause_s, server.pause_s = 0.2, 0.02
        under_way = asyncio.create_task(read(engine, max_tokens=30))
        await until(lambda: "/weight_info" in server.calls)
        await engine.update_weights(NumberTrainer(tmp_path).publish(1, 10.0))
        assert {row[1:] for row in flat(await under_way)} == {(0.0, 0), (-10.0, 1)}

    run(check)


def test_a_server_that_somebody_starts_again_gets_its_weights_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "_BACK_OFF_S", 0.01)

    async def check() -> None:
        first, second = ContractServer(), ContractServer()
        first.pause_s = second.pause_s = 0.03
        async with serving(first) as url:
            engine = VllmEngine(url, version=-1)
            router = Router([engine])
            await router.start()
            await router.update_weights(NumberTrainer(tmp_path).publish(7, 70.0))
            under_way = [asyncio.create_task(rows(router, number)) for number in range(8)]
            await until(lambda: engine.stats().sampled_tokens > 40)
        async with serving(second, int(url.rpartition(":")[2])):
            told = [row for task in under_way for row in await task]
            await router.stop()
        assert set(told) == {(-70.0, 7)} and len(told) == 8 * 50
        assert second.value == 70.0

    async def rows(router: Router, number: int) -> list[tuple[float, int]]:
        chunks = router.generate([5, number], SamplingParams(max_tokens=50))
        return [row async for chunk in chunks for row in zip(chunk.logprobs, chunk.versions, strict=True)]

    async def within() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await check()

    asyncio.run(within())


def test_a_difference_to_weights_that_are_not_there_changes_nothing(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        trainer = NumberTrainer(tmp_path)
        trainer.publish(1, 10.0, delta=True)
        stale = trainer.publish(2, 20.0, delta=True)
        for folder in stale.folder.parent.iterdir():
            if folder != stale.folder:
                folder.rename(tmp_path / "gone")
        with pytest.raises(StaleBaseError):
            await engine.update_weights(stale)
        assert {row[1:] for row in flat(await read(engine))} == {(0.0, 0)}

    run(check)


def test_half_adopted_weights_are_not_sampled_from_and_the_server_goes_on(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        trainer = NumberTrainer(tmp_path)
        server.pause_s = 0.3
        under_way = asyncio.create_task(read(engine, max_tokens=3))
        await until(lambda: engine.stats().sampled_tokens > 0)
        for answer in ((500, "shape mismatch"), (200, "{}"), (200, '{"results": []}'), (404, "no such method")):
            server.answers["/collective_rpc"] = answer
            with pytest.raises(EngineError):
                await engine.update_weights(trainer.publish(1, 10.0))
            with pytest.raises(EngineError, match="failed to adopt version 1"):
                await read(engine)
        del server.answers["/collective_rpc"]
        await engine.update_weights(trainer.publish(1, 10.0))
        with pytest.raises(EngineError, match="failed to adopt version 1"):
            await under_way
        assert {row[1:] for row in flat(await read(engine, max_tokens=2))} == {(-10.0, 1)}

    run(check)


def test_a_server_that_cannot_pause_keeps_its_weights(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        server.answers["/pause"] = 500, "busy"
        with pytest.raises(EngineError, match="busy"):
            await engine.update_weights(NumberTrainer(tmp_path).publish(1, 10.0))
        with pytest.raises(EngineError, match="busy"):
            await engine.pause()
        assert {row[1:] for row in flat(await read(engine))} == {(0.0, 0)}

    run(check)


def test_pauses_nest_and_lose_nothing() -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        await engine.pause()
        await engine.pause()
        reading = asyncio.create_task(read(engine))
        engine.resume()
        await asyncio.sleep(0.05)
        assert not reading.done() and not server.asked
        engine.resume()
        assert len(flat(await reading)) == 12

    run(check)


def test_generations_wait_while_it_sleeps_and_the_next_weights_wake_it(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        trainer = NumberTrainer(tmp_path)
        await engine.update_weights(trainer.publish(1, 10.0))
        under_way = asyncio.create_task(read(engine, max_tokens=40))
        await until(lambda: engine.stats().sampled_tokens > 3)
        server.calls.clear()
        await engine.sleep()
        await engine.sleep()  # does nothing
        late = asyncio.create_task(read(engine))
        await asyncio.sleep(0.03)
        assert server.asleep == {"weights", "kv_cache"} and not late.done()
        await engine.update_weights(trainer.publish(2, 20.0))
        assert server.calls == [
            "/pause?mode=keep", "/sleep?level=2&mode=keep", "/wake_up?tags=weights", "/collective_rpc",
            "/update_weight_version", "/wake_up?tags=kv_cache", "/resume",
        ]  # fmt: skip
        rows = flat(await under_way)
        assert [row[0] for row in rows] == list(range(40)), "none is lost, none comes twice"
        assert {row[1:] for row in rows} == {(-10.0, 1), (-20.0, 2)}
        assert {row[1:] for row in flat(await late)} == {(-20.0, 2)}
        assert engine.stats().extra["probes"] == 2
        await engine.sleep()
        await engine.update_weights(trainer.publish(2, 20.0))
        assert {row[1:] for row in flat(await read(engine))} == {(-20.0, 2)}, "the version from before wakes it too"

    run(check)


def test_it_sleeps_on_until_it_has_whole_weights(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        trainer = NumberTrainer(tmp_path)
        first = trainer.publish(1, 10.0, delta=True)
        await engine.sleep()
        waiting = asyncio.create_task(read(engine))
        stale = trainer.publish(2, 20.0, delta=True)
        first.folder.rename(tmp_path / "gone")
        with pytest.raises(StaleBaseError):
            await engine.update_weights(stale)
        await asyncio.sleep(0.03)
        assert not waiting.done() and server.asleep == {"kv_cache"}
        await engine.update_weights(trainer.publish(2, 20.0))
        assert {row[1:] for row in flat(await waiting)} == {(-20.0, 2)}

    run(check)


def test_pauses_and_sleep_are_taken_back_apart(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        trainer = NumberTrainer(tmp_path)
        await engine.pause()
        await engine.sleep()
        waiting = asyncio.create_task(read(engine))
        await engine.update_weights(trainer.publish(1, 10.0))
        await asyncio.sleep(0.03)
        assert not waiting.done(), "it is paused"
        await engine.sleep()
        engine.resume()
        await asyncio.sleep(0.03)
        assert not waiting.done(), "it sleeps"
        await engine.update_weights(trainer.publish(2, 20.0))
        assert {row[1:] for row in flat(await waiting)} == {(-20.0, 2)}

    run(check)


def test_a_server_that_does_not_fall_asleep_is_not_sampled_from(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        server.answers["/sleep"] = 500, "busy"
        with pytest.raises(EngineError, match="busy"):
            await engine.sleep()
        with pytest.raises(EngineError, match="did not fall asleep"):
            await read(engine)
        await engine.update_weights(NumberTrainer(tmp_path).publish(1, 10.0))
        assert {row[1:] for row in flat(await read(engine))} == {(-10.0, 1)}

    run(check)


def test_a_server_that_sleeps_for_a_run_that_was_killed_is_woken(tmp_path: Path) -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        await engine.sleep()
        other = VllmEngine(engine._server.url)
        await other.start()
        with pytest.raises(EngineError, match="sleeps since before this client started"):
            await read(other)
        await other.update_weights(NumberTrainer(tmp_path).publish(1, 10.0))
        assert {row[1:] for row in flat(await read(other))} == {(-10.0, 1)}
        await other.stop()

    run(check)


def test_who_waits_for_weights_is_told_when_the_client_stops() -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        await engine.pause()
        waiting = asyncio.create_task(read(engine))
        await asyncio.sleep(0.01)
        await engine.stop()
        with pytest.raises(EngineError, match="was stopped"):
            await waiting

    run(check)


def test_kept_tokens_come_where_the_server_tells_them_and_are_refused_elsewhere() -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        with pytest.raises(RequestError, match="--return-sampling-mask"):
            await read(engine, top_k=3, list_kept=True)
        assert len(flat(await read(engine, list_kept=True))) == 12, "without filters there is nothing to tell"
        server.script = [[chunk_of([4, 6], sampling_mask=[[9, 4], [6]]), chunk_of([], finish_reason="length")]]
        first, _ = await read(engine, top_k=3, list_kept=True)
        assert [None if kept is None else kept.tolist() for kept in first.kept_ids] == [[4, 9], [6]]

    run(check)


def encoded(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def test_routed_experts_come_with_their_tokens_and_are_refused_where_there_are_none() -> None:
    async def check(server: ContractServer, engine: VllmEngine) -> None:
        with pytest.raises(EngineError, match="--enable-return-routed-experts"):
            await read(engine)
        every = np.arange((len(PROMPT) + 11) * 6, dtype=np.uint8).reshape(-1, 3, 2)
        server.extra = {"routed_experts": encoded(every)}
        routes = every[:, [0, 2]]
        chunks = await read(engine)
        assert chunks[:11] == [GenerationChunk()] * 11, "each piece that is held back is told of"
        chunks = chunks[11:]
        assert chunks[0].prompt_routes is not None and chunks[0].prompt_routes.dtype == np.int16
        np.testing.assert_array_equal(chunks[0].prompt_routes, routes[: len(PROMPT) - 1])
        assert all(chunk.prompt_routes is None for chunk in chunks[1:])
        told = [chunk.routes for chunk in chunks if chunk.routes is not None]
        np.testing.assert_array_equal(np.concatenate(told), routes[len(PROMPT) - 1 :])
        assert all(len(own) == len(chunk.token_ids) for own, chunk in zip(told, chunks, strict=True))
        for wrong, shape in ((every[1:], r"\(13, 3, 2\)"), (routes, r"\(14, 2, 2\)")):
            server.extra = {"routed_experts": encoded(wrong)}
            with pytest.raises(EngineError, match=rf"of shape {shape}, wanted \(14, 3, 2\)"):
                await read(engine)

    run(check, routes=RoutedLayers(layers=3, with_experts=(0, 2), experts_of_token=2))


def test_a_server_without_the_endpoints_is_refused_at_start() -> None:
    async def check() -> None:
        server = ContractServer()
        server.answers["/update_weight_version"] = 404, "Not Found"
        async with asyncio.timeout(DEADLINE_S), serving(server) as url:
            engine = VllmEngine(url)
            with pytest.raises(EngineError, match="update_weight_version answered 404"):
                await engine.start()
            server.answers["/v1/models"] = 200, "{}"
            with pytest.raises(EngineError, match="does not describe a model"):
                await engine.start()
            await engine.stop()

    asyncio.run(check())
