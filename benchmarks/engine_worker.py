"""One backend of benchmarks/engine.py in a process of its own; imports nothing but what that backend needs.

PYTHON engine_worker.py BACKEND DTYPE MODEL_FOLDER [--only decode prefill trace] [--batches 1 8] [--repeats N]
[--cpu-time]; OMP_NUM_THREADS says how many threads the backend has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

BATCHES = (1, 8, 32, 64)
PROMPT, NEW, PREFILL = 64, 64, 256
AGENTS, TURNS, SYSTEM, TOLD, SAID = 16, 8, 512, 48, 32
REPEATS = 5
CONTEXT = 2048
VOCABULARY = 49_000

Prompts = Sequence[Sequence[int]]


class Backend(Protocol):
    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        """Exactly `new_tokens` sampled tokens for each prompt, with log-probabilities."""
        ...


class Ours:
    def __init__(self, folder: Path, dtype: str) -> None:
        import torch

        from upspiral.config.models import EngineConfig
        from upspiral.engine.embedded.engine import EmbeddedEngine
        from upspiral.weights.cpu import keep_freed_memory
        from upspiral.weights.load import load_model

        keep_freed_memory()
        torch.set_num_threads(1)
        self._runner = asyncio.Runner()
        config = EngineConfig(context_length=CONTEXT, max_running=64, cache_slots=96)
        self._engine = EmbeddedEngine(load_model(folder, dtype=dtype, device="cpu"), config, seed=0, threads=threads())
        self._runner.run(self._engine.start())

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        return self._runner.run(self._all(prompts, new_tokens))

    async def _all(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        return await asyncio.gather(*(self._one(prompt, new_tokens) for prompt in prompts))

    async def _one(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        from upspiral.types import SamplingParams

        sampled: list[int] = []
        async for chunk in self._engine.generate(prompt, SamplingParams(max_tokens=new_tokens)):
            sampled += chunk.token_ids
        return sampled


class Transformers:
    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads())
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        torch = self._torch
        ids = torch.tensor([list(prompt) for prompt in prompts])
        with torch.inference_mode():
            answer = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=True,
                top_k=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            # What training needs of each step.
            for step, logits in enumerate(answer.logits):
                chosen = answer.sequences[:, ids.shape[1] + step, None]
                logits.float().log_softmax(-1).gather(1, chosen)
        return answer.sequences[:, ids.shape[1] :].tolist()


class Vllm:
    def __init__(self, folder: Path, dtype: str, *, caches: bool = True) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="2",
            VLLM_NO_USAGE_STATS="1",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_LOGGING_LEVEL="ERROR",
        )
        from vllm import LLM  # pyright: ignore[reportMissingImports]  (its own environment)

        self._llm: Any = LLM(
            str(folder), dtype=dtype, max_model_len=CONTEXT, max_num_seqs=64, enforce_eager=True,
            enable_prefix_caching=caches, disable_log_stats=True,
        )  # fmt: skip

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[int]]:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        params = SamplingParams(max_tokens=new_tokens, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [list(each.outputs[0].token_ids) for each in self._llm.generate(asked, params, use_tqdm=False)]


class Prompter:
    """Random prompts, none of which begins as another."""

    def __init__(self) -> None:
        self._random = Random(0)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self._random.randrange(VOCABULARY) for _ in range(length)] for _ in range(count)]


@dataclass(frozen=True)
class Bench:
    """What is measured, how often, and with which clock."""

    batches: Sequence[int]
    repeats: int
    clock: Callable[[], float]
    prompter: Prompter

    def seconds(self, work: Callable[[], object]) -> float:
        started = self.clock()
        work()
        return self.clock() - started

    def median(self, work: Callable[[], float]) -> float:
        return statistics.median(work() for _ in range(self.repeats))


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def decode(backend: Backend, bench: Bench) -> dict[str, float]:
    rates: dict[str, float] = {}
    for batch in bench.batches:

        def timed(new_tokens: int, batch: int = batch) -> float:
            prompts = bench.prompter.prompts(batch, PROMPT)
            return bench.seconds(lambda: backend.generate(prompts, new_tokens))

        timed(4)
        first = bench.median(lambda timed=timed: timed(1))
        whole = bench.median(lambda timed=timed: timed(NEW + 1))
        rates[f"decode_{batch}"] = round(batch * NEW / (whole - first), 1)
    return rates


def prefill(backend: Backend, bench: Bench) -> dict[str, float]:
    rates: dict[str, float] = {}
    for batch in bench.batches:

        def timed(batch: int = batch) -> float:
            prompts = bench.prompter.prompts(batch, PREFILL)
            return bench.seconds(lambda: backend.generate(prompts, 1))

        timed()  # warms up
        rates[f"prefill_{batch}"] = round(batch * PREFILL / bench.median(timed), 1)
    return rates


def trace(backend: Backend, bench: Bench) -> float:
    """Seconds of the whole trace. Turns of all agents go together, as far as the backend lets them."""
    prompter = bench.prompter

    def play() -> None:
        (system,) = prompter.prompts(1, SYSTEM)
        histories = [list(system) for _ in range(AGENTS)]
        for _ in range(TURNS):
            for history, told in zip(histories, prompter.prompts(AGENTS, TOLD), strict=True):
                history += told
            for history, said in zip(histories, backend.generate(histories, SAID), strict=True):
                history += said

    return round(bench.median(lambda: bench.seconds(play)), 3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=("ours", "transformers", "vllm"))
    parser.add_argument("dtype")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=["decode", "prefill", "trace"])
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    made: dict[str, Callable[[Path, str], Backend]] = {"ours": Ours, "transformers": Transformers, "vllm": Vllm}
    clock = time.process_time if options.cpu_time else time.perf_counter
    bench = Bench(options.batches, options.repeats, clock, Prompter())
    backend = made[options.backend](options.folder, options.dtype)
    figures: dict[str, Any] = {}
    if "decode" in options.only:
        figures |= decode(backend, bench)
    if "prefill" in options.only:
        figures |= prefill(backend, bench)
    if "trace" in options.only and options.backend != "transformers":
        figures["trace_s"] = trace(backend, bench)
    figures["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    if "trace" in options.only and options.backend == "vllm":
        del backend
        figures["trace_no_cache_s"] = trace(Vllm(options.folder, options.dtype, caches=False), bench)
    print(json.dumps(figures), flush=True)
    sys.stdout.flush()
    os._exit(0)  # engines leave threads behind


if __name__ == "__main__":
    main()
