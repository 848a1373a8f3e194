"""Tokens a second of vLLM behind our gateway and router, and of vLLM's own API server, with the same client.

    python benchmarks/overhead.py [--save] [--dtype bfloat16|float32] [--rounds 5]

One vLLM server (CPU build, SmolLM2-135M) runs throughout. `direct` sends chat completions to it; `ours` sends the same
to `upspiral serve --engine vllm`, a process of its own in front of the same server with a real store on disk, which
asks vLLM for token ids and log-probabilities and commits every turn. Clients hold conversations of TURNS turns and ask
the next one when the last is answered; all that changes between the two ways is the address and the key. Answers end at
MAX_TOKENS or where the model ends them; what counts is the completion tokens that the server says it sampled.

- `ours_N`, `direct_N`: tokens a second with N conversations under way, medians over the rounds, in which both ways take
  turns, the one that begins changing from round to round. `ratio_N`: the median of the rounds' own ratios.
- `direct_logprobs_N`: as `direct_N`, asking for the log-probabilities that training needs.
- `gateway_cpu_share_N`: of one core, what our process used.

vLLM computes on `--engine-threads` threads. On two cores that leaves none for HTTP servers and client, which a GPU
would leave them: so by default vLLM computes on one, and everything else shares the other.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from result import ROOT, report
from upspiral.engine.vllm.environment import vllm_python
from upspiral.engine.vllm.server import ServerSettings, VllmServer
from upspiral.weights.models import resolve_model

MODEL = "smollm2-135m"
IN_FLIGHT = (1, 8, 32)
TURNS, MAX_TOKENS = 4, 64
SECONDS = {1: 12.0, 8: 15.0, 32: 15.0}
"""Of one measurement."""
TARGET = 0.95
SYSTEM = "You are a careful agent with a shell. Think aloud, at length, before you act."
QUESTIONS = (
    "List what you would look at first in a folder of server logs, and why.",
    "The command printed: total 48, app.log, access.log, error.log.1. What next?",
    "grep says: error.log.1:17: connection reset by peer. Explain it to a beginner.",
    "Write what you have found as a report of several paragraphs.",
)
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Way:
    """An API to be asked."""

    url: str
    admin_key: str | None = None
    """Of a gateway, whose rollouts have keys of their own."""
    logprobs: bool = False


@contextmanager
def gateway(engine_url: str, work: Path) -> Iterator[tuple[Way, psutil.Process]]:
    command = [sys.executable, "-m", "upspiral", "serve", "--model", MODEL, "--run", str(work / "served")]
    command += ["--port", "0", "--engine", "vllm", "--engine-url", engine_url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            said = json.loads(process.stdout.readline())
            yield Way(said["url"], said["admin_key"]), psutil.Process(process.pid)
        finally:
            process.terminate()


class Client:
    """Conversations, `in_flight` at a time, until the time is over. Counts what completes within it, and of the last
    answers the part that lies within it."""

    def __init__(self, way: Way, session: aiohttp.ClientSession) -> None:
        self._way, self._session = way, session
        self._numbers = itertools.count()
        self._end = 0.0
        self._tokens = 0.0

    async def tokens_per_s(self, in_flight: int, seconds: float) -> float:
        self._end = time.perf_counter() + seconds
        await asyncio.gather(*(self._converse_on() for _ in range(in_flight)))
        return self._tokens / seconds

    async def _converse_on(self) -> None:
        while time.perf_counter() < self._end:
            await self._conversation(next(self._numbers))

    async def _conversation(self, number: int) -> None:
        key = await self._key(number)
        messages = [{"role": "system", "content": f"{SYSTEM} Case {number}."}]
        for turn in range(TURNS):
            if time.perf_counter() >= self._end:
                return
            messages.append({"role": "user", "content": QUESTIONS[turn]})
            body: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 1.0}
            body["seed"] = 1000 * turn + number
            if self._way.logprobs:
                body["logprobs"] = True
            started = time.perf_counter()
            answer = await self._post("/v1/chat/completions", key, body)
            ended = time.perf_counter()
            within = (min(ended, self._end) - started) / (ended - started)
            self._tokens += within * answer["usage"]["completion_tokens"]
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})

    async def _key(self, number: int) -> str:
        if self._way.admin_key is None:
            return "none"
        body = {"task": "overhead", "group": f"g{number}"}
        return (await self._post("/admin/rollouts", self._way.admin_key, body))["key"]

    async def _post(self, path: str, key: str, body: Any) -> Any:
        headers = {"authorization": f"Bearer {key}"}
        async with self._session.post(self._way.url + path, json=body, headers=headers) as response:
            if response.status != 200:
                raise RuntimeError(f"{path}: {response.status} {(await response.text())[:500]}")
            return await response.json()


async def measured(way: Way, in_flight: int) -> float:
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        return await Client(way, session).tokens_per_s(in_flight, SECONDS[in_flight])


async def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    settings = ServerSettings(
        vllm_python(), resolve_model(MODEL), work / "vllm.log", options.dtype, context_length=2048, max_running=64,
        cpu=True, threads=options.engine_threads, arguments=("--served-model-name", MODEL),
    )  # fmt: skip
    home = VllmServer(settings)
    engine = await home.start()
    figures: dict[str, Any] = {"dtype": options.dtype, "engine_threads": options.engine_threads}
    figures["rounds"] = options.rounds
    try:
        with gateway(engine.url, work) as (ours, process):
            for in_flight in IN_FLIGHT:
                figures |= await compared(engine.url, ours, process, in_flight, options.rounds)
    finally:
        await engine.stop()
        await home.kill()
    return figures


async def compared(engine_url: str, ours: Way, process: psutil.Process, in_flight: int, rounds: int) -> dict[str, Any]:
    ways = {"ours": ours, "direct": Way(engine_url), "direct_logprobs": Way(engine_url, logprobs=True)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    cpu_s = 0.0
    for number in range(-1, rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            before = sum(process.cpu_times()[:2])
            speed = await measured(ways[name], in_flight)
            if number < 0:
                continue  # caches and compiled shapes
            found[name].append(speed)
            cpu_s += (sum(process.cpu_times()[:2]) - before) if name == "ours" else 0.0
        if number >= 0:
            speeds = {name: round(each[-1], 1) for name, each in found.items()}
            print(f"{in_flight} in flight, round {number}: {speeds}", file=sys.stderr, flush=True)
    ratios = [ours / direct for ours, direct in zip(found["ours"], found["direct"], strict=True)]
    return {
        **{f"{name}_{in_flight}": round(statistics.median(each), 1) for name, each in found.items()},
        f"ratio_{in_flight}": round(statistics.median(ratios), 3),
        f"ratios_{in_flight}": [round(each, 3) for each in ratios],
        f"gateway_cpu_share_{in_flight}": round(cpu_s / (rounds * SECONDS[in_flight]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine-threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/overhead.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upspiral-overhead-") as work:
        figures = asyncio.run(measure(options, Path(work)))
    report("overhead", figures, {f"ratio_{count}": TARGET for count in IN_FLIGHT}, save=options.save)


if __name__ == "__main__":
    main()
