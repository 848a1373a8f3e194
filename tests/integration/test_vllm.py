"""Our client against the real vLLM, in its own environment, on a CPU."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.publishing_trainer import PublishingTrainer
from tests.fixtures.tiny_model import make_model
from tests.integration.test_loop import recipe, steps_of
from upspiral.config.loader import load_run_config
from upspiral.engine.kept import KeptEngine
from upspiral.engine.vllm.client import VllmEngine
from upspiral.engine.vllm.environment import is_installed, vllm_python
from upspiral.engine.vllm.server import ServerSettings, VllmServer
from upspiral.errors import ContextLengthError, EngineError, EngineGoneError, RequestError
from upspiral.loop.run import run_training
from upspiral.monitor.progress import LiveProgress
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import SamplingParams
from upspiral.weights.names import hugging_face_tensors
from upspiral.weights.probe import measured_probe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not is_installed(), reason="needs `upspiral engine install vllm`"),
]
# vLLM on CPUs wants heads of 32 at least.
FAMILIES = {"llama": {"hidden_size": 128}, "qwen3": {"tie_word_embeddings": False}}
EXPERTS = {"mlp_only_layers": [], "moe_intermediate_size": 64}
PROMPT = [5, 17, 80, 41, 9, 120, 3]
DEADLINE_S = 500.0


def settings_of(folder: Path, log: Path) -> ServerSettings:
    return ServerSettings(
        vllm_python(), folder, log, "float32", context_length=256, max_running=16, cpu=True, cache_gb=1.0,
        arguments=("--enforce-eager",),
    )  # fmt: skip


@asynccontextmanager
async def running(trainer: Trainer, folder: Path) -> AsyncIterator[VllmEngine]:
    home = VllmServer(settings_of(trainer.folder, folder / "vllm.log"))
    engine = await home.start()
    try:
        yield engine
    finally:
        await engine.stop()
        await home.kill()


class Trainer(PublishingTrainer):
    def __init__(self, family: str, folder: Path) -> None:
        super().__init__(family, folder, **FAMILIES.get(family, EXPERTS))


async def sampled(engine: Any, **params: Any) -> tuple[list[int], list[float], list[int]]:
    ids: list[int] = []
    logprobs: list[float] = []
    versions: list[int] = []
    async for chunk in engine.generate(PROMPT, SamplingParams(**{"max_tokens": 30, "seed": 1, **params})):
        ids += chunk.token_ids
        logprobs += chunk.logprobs
        versions += chunk.versions
    return ids, logprobs, versions


async def agrees(engine: Any, trainer: Trainer, version: int, **params: Any) -> None:
    ids, logprobs, versions = await sampled(engine, **params)
    assert len(ids) == 30 and versions == [version] * 30
    np.testing.assert_allclose(logprobs, trainer.logprobs([*PROMPT, *ids], 30), atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_switched_and_every_token_says_by_which_it_was_sampled(family: str, tmp_path: Path) -> None:
    async def check() -> None:
        trainer = Trainer(family, tmp_path / "model")
        async with running(trainer, tmp_path) as engine:
            assert engine.context_length == 256
            await agrees(engine, trainer, 0)
            for version, part in enumerate(("", "embed_tokens", "layers.1", "lm_head"), 1):
                trainer.change((part,))
                await engine.update_weights(trainer.publish(version))
                await agrees(engine, trainer, version)
            await engine.update_weights(trainer.publish(4))  # again: nothing happens
            await goes_on_over_a_switch(engine, trainer)
            await refuses_and_frees(engine)
            await notices_what_it_did_not_adopt(engine, trainer)
            await sleeps_while_the_trainer_computes(engine, trainer)

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


async def goes_on_over_a_switch(engine: VllmEngine, trainer: Trainer) -> None:
    """Versions 4 and 5. Ten under way when the weights change: all tokens arrive, none under a wrong version."""
    before = trainer.logprobs([*PROMPT, 7], 1)
    running = [asyncio.create_task(sampled(engine, max_tokens=200, seed=seed)) for seed in range(10)]
    while engine.stats().sampled_tokens < 30 * 6 + 10 * 20:
        await asyncio.sleep(0.005)
    trainer.change()
    await engine.update_weights(trainer.publish(5))
    assert abs(trainer.logprobs([*PROMPT, 7], 1) - before) > 1e-3
    crossed = 0
    for task in running:
        ids, logprobs, versions = await task
        assert len(ids) == len(logprobs) == len(versions) == 200
        assert versions == sorted(versions) and set(versions) <= {4, 5}
        crossed += len(set(versions)) == 2
    assert crossed >= 5, "most were in the middle of it"
    await agrees(engine, trainer, 5)


async def notices_what_it_did_not_adopt(engine: VllmEngine, trainer: Trainer) -> None:
    """A publication whose probe is that of other weights: nothing is sampled until there is a right one."""
    tied = trainer.module.config.tie_word_embeddings
    tensors = [(n, t.clone()) for n, t in hugging_face_tensors(trainer.module.named_parameters(), tied=tied)]
    trainer.change()
    probe = measured_probe(trainer.module)
    wrong = trainer._publisher.publish(tensors, 6, trainer.settings, probe=probe)
    with pytest.raises(EngineError, match="answers as if it had not adopted version 6"):
        await engine.update_weights(wrong)
    with pytest.raises(EngineError, match="version 6"):
        await sampled(engine)
    await engine.update_weights(trainer.publish(6))
    await agrees(engine, trainer, 6)


async def sleeps_while_the_trainer_computes(engine: VllmEngine, trainer: Trainer) -> None:
    """Versions 6 and 7, by the calls that free memory on a GPU and none here. Ten are under way when it falls asleep;
    their keys and values are gone, so the new weights compute their tokens again."""
    counted = engine.stats().sampled_tokens
    running = [asyncio.create_task(sampled(engine, max_tokens=240, seed=seed)) for seed in range(10)]
    while engine.stats().sampled_tokens < counted + 10 * 20:
        await asyncio.sleep(0.005)
    await engine.sleep()
    late = asyncio.create_task(sampled(engine))
    await asyncio.sleep(0.3)
    counted = engine.stats().sampled_tokens
    trainer.change()
    await asyncio.sleep(0.3)
    assert engine.stats().sampled_tokens == counted and not late.done()
    await engine.update_weights(trainer.publish(7))
    crossed = 0
    for task in running:
        ids, logprobs, versions = await task
        count = versions.count(6)
        assert versions == [6] * count + [7] * (240 - count)
        expected = trainer.logprobs([*PROMPT, *ids], 240 - count)
        np.testing.assert_allclose(logprobs[count:], expected, atol=2e-4)
        crossed += 0 < count < 240
    assert crossed >= 5, "most were in the middle of it"
    assert (await late)[2] == [7] * 30
    await agrees(engine, trainer, 7)


async def refuses_and_frees(engine: VllmEngine) -> None:
    with pytest.raises(ContextLengthError, match="300 tokens"):
        async for _ in engine.generate([1] * 300, SamplingParams(max_tokens=1)):
            pass
    with pytest.raises(RequestError):
        async for _ in engine.generate([10**6], SamplingParams(max_tokens=1)):
            pass
    generation = engine.generate(PROMPT, SamplingParams(max_tokens=240))
    async for _ in generation:
        break
    await generation.aclose()  # type: ignore[attr-defined]
    assert engine.stats().running == 0
    deadline = time.monotonic() + 5
    while (left := await running_in(engine)) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert left == 0, "a reader that went must not leave its generation running"


async def running_in(engine: VllmEngine) -> float:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(engine._server.url + "/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_experts_that_the_server_keeps_are_noticed(tmp_path: Path) -> None:
    """vLLM's CPU build computes experts from packed copies that loading does not renew. Said by the probe alone."""

    async def check() -> None:
        trainer = Trainer("qwen3-moe", tmp_path / "model")
        async with running(trainer, tmp_path) as engine:
            await agrees(engine, trainer, 0)
            trainer.change()
            with pytest.raises(EngineError, match="answers as if it had not adopted version 1"):
                await engine.update_weights(trainer.publish(1))

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


def test_filters_and_stops(tmp_path: Path) -> None:
    async def check() -> None:
        trainer = Trainer("llama", tmp_path / "model")
        async with running(trainer, tmp_path) as engine:
            ids, logprobs, _ = await sampled(engine, temperature=0.7, top_k=5)
            module = trainer.module
            with torch.no_grad():
                logits = module(input_ids=torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1] / 0.7
            top = logits.topk(5)
            expected = top.values.log_softmax(-1)[top.indices == torch.tensor(ids)[:, None]]
            np.testing.assert_allclose(logprobs, expected.numpy(), atol=2e-4)
            greedy, logprobs, _ = await sampled(engine, temperature=0.0)
            np.testing.assert_allclose(logprobs, trainer.logprobs([*PROMPT, *greedy], 30), atol=2e-4)
            stop = greedy[6]
            ids, _, _ = await sampled(engine, temperature=0.0, stop_token_ids=(stop,))
            assert ids == greedy[: greedy.index(stop) + 1], "the stop token was sampled, so it is delivered"
            same = [(await sampled(engine, seed=7))[0] for _ in range(2)]
            assert same[0] == same[1]
            await many_long_prompts_with_seeds(engine)

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


async def many_long_prompts_with_seeds(engine: VllmEngine) -> None:
    """More tokens than one step takes: on a CPU, vLLM 0.32.0 dies of a prompt that it computes in parts and that has a
    seed, so it is started in a way that computes none so."""

    async def one(number: int) -> int:
        params = SamplingParams(max_tokens=4, seed=number)
        return sum([len(chunk.token_ids) async for chunk in engine.generate([number + 3] * 240, params)])

    assert await asyncio.gather(*(one(number) for number in range(40))) == [4] * 40


def test_a_server_that_is_killed_is_started_again_with_the_weights_that_it_had(tmp_path: Path) -> None:
    async def check() -> None:
        trainer = Trainer("llama", tmp_path / "model")
        homes: list[VllmServer] = []

        def make_home() -> VllmServer:
            homes.append(VllmServer(settings_of(trainer.folder, tmp_path / "vllm.log")))
            return homes[-1]

        engine = KeptEngine(make_home)
        await engine.start()
        try:
            trainer.change()
            await engine.update_weights(trainer.publish(1))
            counted = engine.stats().sampled_tokens
            under_way = asyncio.create_task(sampled(engine, max_tokens=240))
            while engine.stats().sampled_tokens < counted + 5:
                await asyncio.sleep(0.005)
            process = homes[0]._process
            assert process is not None
            os.killpg(process.pid, signal.SIGKILL)
            with pytest.raises(EngineError):
                await under_way
            counted = engine.stats().sampled_tokens
            await when_it_is_back(lambda: agrees(engine, trainer, 1))
            assert engine.stats().sampled_tokens == counted + 30
            assert len(homes) == 2
            await dies_asleep(engine, homes, trainer)
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(check(), DEADLINE_S))


async def dies_asleep(engine: KeptEngine, homes: list[VllmServer], trainer: Trainer) -> None:
    """Version 2 wakes it, for which another one is started."""
    await engine.sleep()
    process = homes[-1]._process
    assert process is not None
    os.killpg(process.pid, signal.SIGKILL)
    await asyncio.sleep(3.0)
    assert len(homes) == 2, "the memory is the trainer's"
    trainer.change()
    publication = trainer.publish(2)
    await when_it_is_back(lambda: engine.update_weights(publication))
    assert len(homes) == 3
    await agrees(engine, trainer, 2)


async def when_it_is_back(work: Callable[[], Awaitable[None]]) -> None:
    """As the router does it, until the test's deadline."""
    while True:
        try:
            return await work()
        except EngineGoneError:
            await asyncio.sleep(0.5)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "nowhere", tmp_path / "vllm.log")
    with pytest.raises(EngineError, match=r"(?s)vLLM's server did not start \(exit code 1\); the end of .*nowhere"):
        asyncio.run(VllmServer(settings).start())


def test_a_run_whose_rollouts_are_on_vllm_learns(tmp_path: Path) -> None:
    """Rewards rise, the ledger closes, tokens carry the version of their step, engine and trainer agree."""
    model = make_model(tmp_path / "model", hidden=128)
    file = recipe(tmp_path, model, steps=8)
    file.write_text(file.read_text().replace("cache_slots = 64\n", ""))
    config = load_run_config(file, {"engine.kind": "vllm", "engine.server.arguments": '["--enforce-eager"]'})
    folder = tmp_path / "run"
    run_training(config, folder, resume=False, progress=LiveProgress("tiny", 8, quiet=True))
    steps = steps_of(folder)
    rewards = [line["reward_mean"] for line in steps]
    assert len(steps) == 8 and fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.2, rewards
    assert all(line["ledger"]["difference"] == 0 for line in steps)
    assert all(line["mismatch_max_abs"] < 1e-3 for line in steps if line["trained_tokens"]), "float32 must agree"
    store = TrajectoryStore(folder / "trajectories.db", create=False)
    for rollout in store.rollouts(split="train"):
        graph = store.graph(rollout.id)
        assert {int(v) for node in graph.nodes for v in node.versions[node.sampled]} == {rollout.step - 1}
    store.close()
