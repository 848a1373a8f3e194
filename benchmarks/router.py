"""What the router adds to a generation, in microseconds of CPU time: a loaded machine changes it little.

    python benchmarks/router.py [--save]

Engines that take no time answer with one token a chunk. `added_us_TOKENS_ENGINES` is a generation of one token through
the router less one of the same engine without it, for a prompt of so many tokens that was seen before, as an agent's
next turn is; `added_us_token` is each further token. Medians of ROUNDS rounds, which take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator

import numpy as np

from result import report
from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds
from upspiral.engine.router import Router
from upspiral.types import SamplingParams
from upspiral.weights.publication import Publication

ROUNDS, GENERATIONS = 9, 200
PROMPTS, ENGINES = (128, 2048, 32768), (2, 32)
MORE_TOKENS = 65


class Instant:
    """An engine that takes no time."""

    version = 0
    context_length = 1 << 20

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        for left in range(params.max_tokens - 1, -1, -1):
            yield GenerationChunk((7,), (-1.0,), (0,), None if left else "length")

    def stats(self) -> EngineStats:
        return EngineStats()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def update_weights(self, publication: Publication) -> None: ...

    async def sleep(self) -> None: ...

    async def pause(self) -> None: ...

    def resume(self) -> None: ...


async def cpu_us(engine: Instant | Router, prompts: list[np.ndarray], tokens: int) -> float:
    """Of one generation."""
    params = SamplingParams(max_tokens=tokens)
    begun = time.process_time()
    for prompt in prompts:
        async for _ in engine.generate(prompt, params):
            pass
    return (time.process_time() - begun) / len(prompts) * 1e6


async def added_us(prompt_tokens: int, engines: int, tokens: int) -> float:
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 50_000, prompt_tokens).astype(np.int32) for _ in range(8)] * (GENERATIONS // 8)
    direct, router = Instant(), Router([Instant() for _ in range(engines)])
    await cpu_us(router, prompts, tokens)
    differences = [await cpu_us(router, prompts, tokens) - await cpu_us(direct, prompts, tokens) for _ in range(ROUNDS)]
    return statistics.median(differences)


async def measured() -> dict[str, float]:
    figures = {
        f"added_us_{prompt_tokens}_{engines}": round(await added_us(prompt_tokens, engines, 1), 1)
        for prompt_tokens in PROMPTS
        for engines in ENGINES
    }
    more = await added_us(128, 2, MORE_TOKENS) - await added_us(128, 2, 1)
    return {**figures, "added_us_token": round(more / (MORE_TOKENS - 1), 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true")
    report("router", asyncio.run(measured()), {}, save=parser.parse_args().save)
