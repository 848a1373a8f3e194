"""A switch of weights on the real vLLM (CPU build) while it generates: how long, and whether any token is lost.

    python benchmarks/weight_switch.py [--save] [--dtype bfloat16|float32] [--switches 5] [--running 8]

SmolLM2-135M. The trainer's module changes, is published in shared memory, and the server adopts it while RUNNING
generations are under way. `upspiral engine install vllm` makes the environment, or UPSPIRAL_VLLM_PYTHON names another.

- `publish_s`: writing the publication, with its checksums and its probe. `switch_s`: from the call of `update_weights`
  to its return: held, adopted, released and probed. Medians over the switches. `held_s`: how long no token came.
- `tokens_lost`: asked for and not delivered. `versions_wrong`: tokens whose version is older than one before them, or
  is none that was current between their generation's begin and end. `crossed`: generations with tokens of two versions.
- `probe_mismatch`: the server's log-probabilities after the last switch against the trainer's, mean of absolute values;
  `stale_mismatch` against the weights of the first version: what the probe would have shown had it kept those.
- `restarts`: of the server, by its process id.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from result import report
from upspiral.engine.vllm.client import VllmEngine
from upspiral.engine.vllm.environment import vllm_python
from upspiral.engine.vllm.server import ServerSettings, VllmServer
from upspiral.types import SamplingParams
from upspiral.weights.load import load_model
from upspiral.weights.models import resolve_model
from upspiral.weights.names import hugging_face_tensors
from upspiral.weights.probe import measured_probe
from upspiral.weights.publication import PublisherSettings
from upspiral.weights.publisher import Publisher

MODEL = "smollm2-135m"
NEW_TOKENS = 160


async def generation(engine: VllmEngine, seed: int, arrivals: list[float]) -> tuple[int, list[int], int, int]:
    """Tokens asked for, versions of those that came, and the engine's version at both ends."""
    before, versions = engine.version, list[int]()
    async for chunk in engine.generate([1, 2 + seed, 30], SamplingParams(max_tokens=NEW_TOKENS, seed=seed)):
        versions += chunk.versions
        arrivals.append(time.perf_counter())
    return NEW_TOKENS, versions, before, engine.version


async def measure(options: argparse.Namespace, work: Path, shared: Path) -> dict[str, Any]:
    folder = resolve_model(MODEL)
    module: Any = load_model(folder, dtype=options.dtype, device="cpu").module
    publisher, settings = Publisher(folder), PublisherSettings(shared)
    home = VllmServer(ServerSettings(
        vllm_python(), folder, work / "vllm.log", options.dtype, context_length=256, max_running=32, cpu=True,
        threads=torch.get_num_threads(),
    ))  # fmt: skip
    engine = await home.start()
    assert home._process is not None
    process_id, first_probe = home._process.pid, measured_probe(module)
    publish_s, switch_s, held_s, done = [], [], [], []
    try:
        for version in range(1, options.switches + 1):
            arrivals: list[float] = []
            seeds = range(version * 100, version * 100 + options.running)
            running = [asyncio.create_task(generation(engine, seed, arrivals)) for seed in seeds]
            while len(arrivals) < 10 * options.running:
                await asyncio.sleep(0.01)
            started = time.perf_counter()
            publication = await asyncio.to_thread(change_and_publish, module, publisher, settings, version)
            publish_s.append(time.perf_counter() - started)
            started = time.perf_counter()
            await engine.update_weights(publication)
            switch_s.append(time.perf_counter() - started)
            done += await asyncio.gather(*running)
            held_s.append(float(np.diff([each for each in arrivals if each > started - 1]).max()))
        assert home._process.pid == process_id and home._process.poll() is None
        stats = engine.stats().extra
        last_probe = measured_probe(module)
    finally:
        await engine.stop()
        await home.kill()
    stale = np.mean(np.abs(np.array(first_probe.logprobs) - np.array(last_probe.logprobs)))
    return {
        "publish_s": round(statistics.median(publish_s), 3),
        "switch_s": round(statistics.median(switch_s), 3),
        "held_s": round(statistics.median(held_s), 3),
        "switches": options.switches,
        "generations": len(done),
        "tokens_lost": sum(asked - len(versions) for asked, versions, _, _ in done),
        "versions_wrong": sum(wrong(versions, before, after) for _, versions, before, after in done),
        "crossed": sum(len(set(versions)) == 2 for _, versions, _, _ in done),
        "probe_mismatch": float(f"{stats['probe_mismatch']:.3g}"),
        "stale_mismatch": float(f"{stale:.3g}"),
        "restarts": 0,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def change_and_publish(module: Any, publisher: Publisher, settings: PublisherSettings, version: int) -> Any:
    """Every weight moves by about a hundredth of itself: more than a step does, so that stale ones would be seen."""
    for parameter in module.parameters():
        parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    tensors = hugging_face_tensors(module.named_parameters(), tied=module.config.tie_word_embeddings)
    return publisher.publish(tensors, version, settings, probe=measured_probe(module))


def wrong(versions: list[int], before: int, after: int) -> int:
    falling = sum(second < first for first, second in pairwise(versions))
    return falling + sum(not before <= version <= after for version in versions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--switches", type=int, default=5)
    parser.add_argument("--running", type=int, default=8, help="generations under way at a switch")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/weight_switch.json")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="upspiral-switch-") as work,
        tempfile.TemporaryDirectory(prefix="upspiral-switch-", dir="/dev/shm") as shared,
    ):
        figures = asyncio.run(measure(options, Path(work), Path(shared)))
    report("weight_switch", figures, {"tokens_lost": 0, "versions_wrong": 0, "restarts": 0}, save=options.save)


if __name__ == "__main__":
    main()
