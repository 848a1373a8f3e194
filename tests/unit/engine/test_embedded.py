"""The embedded engine against transformers, on a tiny random Llama."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from upspiral.config.models import EngineConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.errors import ConfigError, ContextLengthError, EngineError, RequestError
from upspiral.types import FinishReason, SamplingParams
from upspiral.weights.load import LoadedModel

VOCABULARY = 200


def _model(tied: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> LoadedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "initializer_range": 0.3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **{**sizes, **heads, **changes})
    return LoadedModel.from_module(LlamaForCausalLM(config).to(dtype))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def model() -> LoadedModel:
    return _model()


def _config(**changes: int) -> EngineConfig:
    sizes = {"max_running": 8, "cache_slots": 16, "context_length": 256, "prefill_tokens": 64}
    return EngineConfig.model_validate({**sizes, **changes})


def _prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Completion:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


async def _complete(engine: EmbeddedEngine, prompt: Sequence[int], max_tokens: int = 12, **sampling: Any) -> Completion:
    completion = Completion()
    async for chunk in engine.generate(prompt, SamplingParams(max_tokens=max_tokens, **sampling)):
        completion.ids += chunk.token_ids
        completion.logprobs += chunk.logprobs
        completion.versions += chunk.versions
        completion.finish_reason = chunk.finish_reason
    return completion


@asynccontextmanager
async def _running(model: LoadedModel, seed: int = 0, **changes: int) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(model, _config(**changes), seed=seed)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def _run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


def _reference(model: LoadedModel, prompt: Sequence[int], ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """The log-probabilities of a completion from one plain forward pass of transformers."""
    with torch.no_grad():
        logits = model.module(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def _assert_logprobs(model: LoadedModel, prompt: Sequence[int], completion: Completion, **options: float) -> None:
    expected = _reference(model, prompt, completion.ids, **options)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-4)


VARIANTS = {
    "tied": {},
    "untied": {"tied": False},
    "no grouping": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 32},
    "scaled rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_generate_of_transformers(variant: str) -> None:
    model, prompt = _model(**VARIANTS[variant]), _prompt(90)

    async def main() -> Completion:
        async with _running(model) as engine:
            return await _complete(engine, prompt, 30, temperature=0.0)

    completion = _run(main())
    expected = model.module.generate(  # pyright: ignore[reportAttributeAccessIssue]
        torch.tensor([prompt]), attention_mask=torch.ones(1, 90), max_new_tokens=30, do_sample=False, eos_token_id=None
    )
    assert completion.ids == expected[0, 90:].tolist()
    _assert_logprobs(model, prompt, completion)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_a_mixed_batch_equal_a_full_forward(model: LoadedModel, temperature: float) -> None:
    prompts = [_prompt(length, seed=length) for length in (1, 2, 17, 64, 65, 130, 200)]

    async def main() -> list[Completion]:
        async with _running(model) as engine:
            return await asyncio.gather(*(_complete(engine, p, 20, temperature=temperature) for p in prompts))

    for prompt, completion in zip(prompts, _run(main()), strict=True):
        assert len(completion.ids) == 20
        _assert_logprobs(model, prompt, completion, temperature=temperature)


def test_siblings_share_one_prefill_and_decode_rightly(model: LoadedModel) -> None:
    prompt = _prompt(150)

    async def main() -> list[Completion]:
        async with _running(model) as engine:
            completions = await asyncio.gather(*(_complete(engine, prompt) for _ in range(8)))
            stats = engine.stats()
            assert stats.prefilled_tokens == 150 + 7
            assert stats.reused_tokens == 7 * 149
            return completions

    completions = _run(main())
    assert len({tuple(completion.ids) for completion in completions}) > 1
    for completion in completions:
        _assert_logprobs(model, prompt, completion)


def test_groups_of_siblings_below_one_system_prompt_decode_rightly(model: LoadedModel) -> None:
    """Runs shared by all, by some, and by nobody, in slots that are not in order, with answers of different lengths."""
    system = _prompt(70)
    prompts = [system + _prompt(60, seed=group) for group in (1, 2) for _ in range(3)]
    prompts = [_prompt(5, seed=7), *prompts[::2], _prompt(190, seed=8), *prompts[1::2]]

    async def main() -> list[Completion]:
        async with _running(model) as engine:
            return await asyncio.gather(*(_complete(engine, p, 10 + 5 * i) for i, p in enumerate(prompts)))

    for prompt, completion in zip(prompts, _run(main()), strict=True):
        _assert_logprobs(model, prompt, completion)


def test_next_turn_continues_in_place_and_equals_a_cold_engine(model: LoadedModel) -> None:
    async def turns(engine: EmbeddedEngine, prompts: list[list[int]]) -> list[Completion]:
        return [await _complete(engine, prompt, seed=3) for prompt in prompts]

    async def main() -> None:
        async with _running(model) as engine:
            first = await _complete(engine, _prompt(70), seed=3)
            second_prompt = [*_prompt(70), *first.ids, *_prompt(9, seed=1)]
            before = engine.stats()
            second = await _complete(engine, second_prompt, seed=3)
            after = engine.stats()
        assert after.reused_tokens - before.reused_tokens == 70 + 12 - 1  # the last sampled token was never fed back
        assert after.prefilled_tokens - before.prefilled_tokens == 1 + 9
        assert after.extra["held_tokens"] == len(second_prompt) + 12 - 1
        async with _running(model) as cold:
            expected = await _complete(cold, second_prompt, seed=3)
        assert second.ids == expected.ids
        assert second.logprobs == pytest.approx(expected.logprobs, abs=1e-4)

    _run(main())


def test_a_fork_does_not_destroy_what_it_forked_from(model: LoadedModel) -> None:
    async def main() -> None:
        async with _running(model) as engine:
            trunk = await _complete(engine, _prompt(100))
            await _complete(engine, [*_prompt(60), *_prompt(40, seed=5)])
            before = engine.stats().reused_tokens
            await _complete(engine, [*_prompt(100), *trunk.ids, 7])
            assert engine.stats().reused_tokens - before == 111

    _run(main())


def test_seeds_do_not_depend_on_the_batch(model: LoadedModel) -> None:
    prompts = [_prompt(40, seed=index) for index in range(6)]

    async def alone() -> list[Completion]:
        async with _running(model) as engine:
            return [await _complete(engine, prompt, seed=-index) for index, prompt in enumerate(prompts)]

    async def together() -> list[Completion]:
        async with _running(model, max_running=4) as engine:
            jobs = [_complete(engine, prompt, seed=-index) for index, prompt in enumerate(prompts)]
            noise = [_complete(engine, _prompt(30, seed=50 + index), 5) for index in range(4)]
            return (await asyncio.gather(*noise, *jobs))[4:]

    one, other = _run(alone()), _run(together())
    assert [completion.ids for completion in one] == [completion.ids for completion in other]


def test_engine_seed_and_arrival_number_seed_the_rest(model: LoadedModel) -> None:
    async def main(seed: int) -> list[list[int]]:
        async with _running(model, seed=seed) as engine:
            return [(await _complete(engine, _prompt(20))).ids for _ in range(2)]

    first = _run(main(1))
    assert first[0] != first[1]
    assert first == _run(main(1))
    assert first != _run(main(2))


def test_filters_bound_what_is_sampled_and_its_logprob(model: LoadedModel) -> None:
    prompt = _prompt(30)

    async def main() -> tuple[Completion, Completion, Completion]:
        async with _running(model) as engine:
            greedy = await _complete(engine, prompt, 20, temperature=0.0)
            top_1 = await _complete(engine, prompt, 20, top_k=1)
            tiny_p = await _complete(engine, prompt, 20, top_p=1e-6)
            return greedy, top_1, tiny_p

    greedy, top_1, tiny_p = _run(main())
    assert greedy.ids == top_1.ids == tiny_p.ids
    assert top_1.logprobs == tiny_p.logprobs == [0.0] * 20


def test_logprobs_are_the_models_renormalised_over_the_kept_ids(model: LoadedModel) -> None:
    prompt = _prompt(30)
    filtered = SamplingParams(max_tokens=20, list_kept=True, top_p=0.8, top_k=20, min_p=0.02, temperature=0.7)
    unfiltered = SamplingParams(max_tokens=1, list_kept=True)

    async def main() -> list[Any]:
        async with _running(model) as engine:
            for params in (unfiltered, replace(unfiltered, temperature=0.0, top_k=3)):
                assert [chunk.kept_ids async for chunk in engine.generate(prompt, params)] == [(None,)]
            silent = engine.generate(prompt, SamplingParams(max_tokens=1, top_k=3))
            assert [chunk.kept_ids async for chunk in silent] == [()]
            return [chunk async for chunk in engine.generate(prompt, filtered)]

    chunks = _run(main())
    ids = [chunk.token_ids[0] for chunk in chunks]
    with torch.no_grad():
        logits = model.module(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float() / 0.7
    for chunk, token_id, row in zip(chunks, ids, logits, strict=True):
        (kept,), (logprob,) = chunk.kept_ids, chunk.logprobs
        assert 1 <= len(kept) <= 20
        assert token_id in kept.tolist()
        assert sorted(kept.tolist()) == kept.tolist()
        left_out = np.setdiff1d(np.arange(VOCABULARY), kept)
        assert row[kept].min() > row[left_out].max()
        assert logprob == pytest.approx(float(row[token_id] - row[kept].logsumexp(0)), abs=1e-4)


def test_stop_token_is_sampled_recorded_and_last(model: LoadedModel) -> None:
    prompt = _prompt(30)

    async def main() -> tuple[Completion, Completion]:
        async with _running(model) as engine:
            free = await _complete(engine, prompt, 20, seed=1)
            stopped = await _complete(engine, prompt, 20, seed=1, stop_token_ids=(free.ids[6],))
            return free, stopped

    free, stopped = _run(main())
    assert stopped.finish_reason == "stop"
    assert stopped.ids == free.ids[: free.ids.index(free.ids[6]) + 1]


def test_more_requests_than_slots_all_finish(model: LoadedModel) -> None:
    lengths = [(5 + 13 * index % 120, 1 + 7 * index % 40) for index in range(40)]

    async def main() -> None:
        async with _running(model, max_running=4, cache_slots=5) as engine:
            jobs = [_complete(engine, _prompt(p, seed=p), n) for p, n in lengths]
            completions = await asyncio.gather(*jobs)
            stats = engine.stats()
        for (prompt_length, count), completion in zip(lengths, completions, strict=True):
            assert len(completion.ids) == count
            _assert_logprobs(model, _prompt(prompt_length, seed=prompt_length), completion)
        assert stats.extra["evicted_tokens"] > 0
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.sampled_tokens == sum(count for _, count in lengths)
        assert stats.prefilled_tokens + stats.reused_tokens == sum(prompt for prompt, _ in lengths)

    _run(main())


def test_oldest_idle_sequence_is_evicted(model: LoadedModel) -> None:
    async def main() -> None:
        async with _running(model, max_running=1, cache_slots=2) as engine:
            for seed in (1, 2, 3):
                await _complete(engine, _prompt(50, seed=seed), 1)
            for seed, reused in ((3, 49), (1, 0)):
                before = engine.stats().reused_tokens
                await _complete(engine, _prompt(50, seed=seed), 1)
                assert engine.stats().reused_tokens - before == reused, seed

    _run(main())


async def _first_chunk(engine: EmbeddedEngine, prompt: list[int], params: SamplingParams) -> AsyncIterator[Any]:
    stream = engine.generate(prompt, params)
    await anext(stream)
    return stream


def test_closing_the_iterator_frees_the_slot(model: LoadedModel) -> None:
    async def main() -> None:
        async with _running(model, max_running=1) as engine:
            stream = await _first_chunk(engine, _prompt(20), SamplingParams(max_tokens=230))
            other = asyncio.create_task(_complete(engine, _prompt(20, seed=1), 3))
            await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
            assert len((await other).ids) == 3
            assert engine.stats().sampled_tokens < 200

    _run(main())


def test_cancelling_the_reader_cancels_the_generation(model: LoadedModel) -> None:
    async def main() -> None:
        async with _running(model) as engine:
            tasks = [asyncio.create_task(_complete(engine, _prompt(20, seed=s), 230)) for s in range(12)]
            await _until(lambda: engine.stats().sampled_tokens > 20)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await _until(lambda: engine.stats().running + engine.stats().waiting == 0)
            assert len((await _complete(engine, _prompt(20), 4)).ids) == 4

    _run(main())


def test_publish_after_an_in_place_change(model: LoadedModel) -> None:
    prompt = _prompt(60)

    async def main() -> tuple[Completion, Completion]:
        async with _running(model) as engine:
            old = await _complete(engine, prompt, 20, seed=1)
            async with engine.paused():
                generator = torch.Generator().manual_seed(9)
                for parameter in model.module.parameters():
                    parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
            engine.publish(4)
            assert engine.version == 4
            reused = engine.stats().reused_tokens
            new = await _complete(engine, prompt, 20, seed=1)
            assert engine.stats().reused_tokens == reused
            return old, new

    old, new = _run(main())
    assert old.versions == [0] * 20
    assert new.versions == [4] * 20
    _assert_logprobs(model, prompt, new)
    assert max(abs(_reference(model, prompt, old.ids) - torch.tensor(old.logprobs))) > 1e-2


def test_a_generation_crosses_a_publication(model: LoadedModel) -> None:
    async def main() -> None:
        async with _running(model) as engine:
            tasks = [asyncio.create_task(_complete(engine, _prompt(60), 150)) for _ in range(3)]
            await _until(lambda: engine.stats().sampled_tokens > 30)
            engine.publish(1)
            for completion in await asyncio.gather(*tasks):
                assert completion.versions == sorted(completion.versions)
                assert set(completion.versions) == {0, 1}
            before = engine.stats().reused_tokens
            await _complete(engine, _prompt(60), 1)
            assert engine.stats().reused_tokens == before

    _run(main())


def test_no_step_runs_while_paused(model: LoadedModel) -> None:
    async def main() -> None:
        async with _running(model) as engine:
            task = asyncio.create_task(_complete(engine, _prompt(20), 200))
            await _until(lambda: engine.stats().sampled_tokens > 5)
            async with engine.paused(), engine.paused():
                steps = engine.stats().extra["steps"]
                await asyncio.sleep(0.1)
                assert engine.stats().extra["steps"] == steps
            assert len((await task).ids) == 200

    _run(main())


def test_completion_ends_where_the_context_ends(model: LoadedModel) -> None:
    async def main() -> Completion:
        async with _running(model, context_length=64) as engine:
            return await _complete(engine, _prompt(60), 50)

    completion = _run(main())
    assert len(completion.ids) == 4
    assert completion.finish_reason == "length"


async def _expect(error: type[Exception], match: str, request: Callable[[], Awaitable[Any]]) -> None:
    with pytest.raises(error, match=match):
        await request()


def test_bad_requests_are_refused_and_harm_nobody(model: LoadedModel) -> None:
    async def main() -> None:
        async with _running(model, context_length=64) as engine:
            await _expect(ContextLengthError, r"64 tokens.*shorten the prompt", lambda: _complete(engine, _prompt(64)))
            await _expect(RequestError, "vocabulary", lambda: _complete(engine, [1, VOCABULARY]))
            await _expect(RequestError, "at least 1", lambda: _complete(engine, []))
            await _expect(RequestError, "at least 1", lambda: _complete(engine, [1], 0))
            assert len((await _complete(engine, _prompt(63))).ids) == 1

    _run(main())


def test_a_failing_step_fails_every_request_and_the_engine_recovers(model: LoadedModel) -> None:
    """Weights that have diverged to NaN make a real step fail; restored weights must not see what it left behind."""
    prompts = [_prompt(50, seed=seed) for seed in range(10)]
    weight = model.module.get_parameter("model.layers.1.mlp.down_proj.weight").data

    async def main() -> Completion:
        async with _running(model, max_running=4) as engine:
            healthy = weight.clone()
            weight.fill_(float("nan"))
            engine.publish(1)
            failures = await asyncio.gather(*(_complete(engine, p) for p in prompts), return_exceptions=True)
            for failure in failures:
                assert isinstance(failure, EngineError)
                assert "not finite" in str(failure)
            assert engine.stats().extra["failed_steps"] > 0
            assert engine.stats().extra["held_tokens"] == 0
            weight.copy_(healthy)
            engine.publish(2)
            completions = await asyncio.gather(*(_complete(engine, p) for p in prompts))
            return completions[-1]

    _assert_logprobs(model, prompts[-1], _run(main()))


def test_stop_ends_open_requests_and_start_begins_anew(model: LoadedModel) -> None:
    async def main() -> None:
        engine = EmbeddedEngine(model, _config(), seed=0)
        await _expect(EngineError, r"call start\(\) first", lambda: _complete(engine, [1, 2]))
        await engine.start()
        task = asyncio.create_task(_complete(engine, _prompt(20), 230))
        await _until(lambda: engine.stats().sampled_tokens > 0)
        await engine.stop()
        await _expect(EngineError, "stopped", lambda: task)
        await engine.start()
        assert len((await _complete(engine, _prompt(20), 3)).ids) == 3
        await engine.stop()

    _run(main())


def test_context_beyond_the_model_is_refused(model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"engine\.context_length = 512.*256 positions"):
        EmbeddedEngine(model, _config(context_length=512), seed=0)


def test_bfloat16_is_close_to_transformers() -> None:
    model, prompts = _model(dtype=torch.bfloat16, initializer_range=0.1), [_prompt(150, seed=s) for s in range(4)]

    async def main() -> list[Completion]:
        async with _running(model) as engine:
            return await asyncio.gather(*(_complete(engine, prompt, 30) for prompt in prompts))

    for prompt, completion in zip(prompts, _run(main()), strict=True):
        difference = _reference(model, prompt, completion.ids) - torch.tensor(completion.logprobs)
        assert difference.abs().mean() < 0.05


def test_exclusive_work_runs_on_the_engines_thread_and_its_errors_come_back(model: LoadedModel) -> None:
    async def main() -> None:
        async with _running(model) as engine:
            generating = asyncio.create_task(_complete(engine, _prompt(10), max_tokens=30))
            assert await engine.exclusive(threading.get_ident) != threading.get_ident()
            with pytest.raises(ZeroDivisionError):
                await engine.exclusive(lambda: 1 // 0)
            assert len((await generating).ids) == 30

    _run(main())


def test_copies_of_weights_are_given_up_while_other_work_is_done() -> None:
    def packed() -> int:
        gc.collect()  # engines of other tests
        return sum(type(each) is torch.Tensor and each.is_mkldnn for each in gc.get_objects())

    async def main() -> None:
        before = packed()
        async with _running(_model()) as engine:
            first = await _complete(engine, _prompt(10), seed=1)
            if packed() == before:
                pytest.skip("no weights are laid out anew on this machine")
            assert await engine.exclusive(packed) == before
            assert (await _complete(engine, _prompt(10), seed=1)).ids == first.ids
            assert packed() > before

    _run(main())
