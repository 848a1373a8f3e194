"""Seconds from a trainer's new weights to an engine's parameters that hold them, by how they get there.

    python benchmarks/publish.py [--save] [--rounds 9] [--warm-up 4]

SmolLM2-135M in bfloat16. In each round the local trainer takes a step of AdamW at a learning rate of 2e-5 on real text,
so that what changes is what changes in a run; then every way takes its turn, each with its own publisher and receiver.
Seconds are medians over the rounds after the warm-up and end when a second module has all weights, which is checked to
the bit; checksums are made and checked where we publish, and there is no probe.

- `disk_s`: what one would do without us: safetensors' `save_file`, fsync, `load_file`, copy. The tensors are laid out
  for `save_file` beforehand, and old files removed, outside the time. `load_file` finds the file in the page cache.
- `full_s`, `delta_s`: our whole publications and differences on the same disk, synced if whole.
- `shared_s`, `delta_shared_s`: the same in shared memory. `first_shared_s` is the first one, whose pages are new.
- `parts` are seconds of writing, reading and copying; an engine waits for the copying alone.
- `delta_bytes_share`: bytes of a difference over bytes of the weights. `changed_share`: of the elements.
- `disk_over_shared`: disk_s over shared_s.
- `probe_s`: what the trainer computes for engines to check themselves; not part of any of the above.
- `checksum_gb_s`: of the largest tensor, by our checksum and by two of the standard library.

One thread computes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from result import ROOT, report
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.engine.embedded.adoption import Adoption
from upspiral.trainer.forest import Item, pack
from upspiral.trainer.local import LocalTrainer
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import NodeCredit, RolloutCredit
from upspiral.weights.cpu import keep_freed_memory
from upspiral.weights.load import LoadedModel, load_model
from upspiral.weights.models import resolve_model
from upspiral.weights.names import hugging_face_views
from upspiral.weights.probe import measured_probe
from upspiral.weights.publication import PublisherSettings
from upspiral.weights.publisher import Publisher
from upspiral.weights.receiver import checksum

MODEL = "smollm2-135m"
TARGET_RATIO = 5.0
LEARNING_RATE = 2e-5
PROMPT, ANSWER, ROLLOUTS = 64, 64, 4

Times = dict[str, float]
"""Seconds by part; their sum is what counts."""


class Steps:
    """A trainer that learns from text: rollouts are pieces of it, with rewards drawn from a seed."""

    def __init__(self, folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        pages = sorted((ROOT / "docs" / "design").glob("*.md"))
        text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
        self._ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        self._random = np.random.default_rng(0)
        self.model = load_model(folder, dtype="bfloat16", device="cpu")
        config = TrainerConfig(lr=LEARNING_RATE)
        self._trainer = LocalTrainer(self.model.module, config, AlgorithmConfig(), temperature=1.0)

    def take(self) -> float:
        """One step; which share of the weights it changed."""
        before = [parameter.detach().clone() for parameter in self.model.module.parameters()]
        rollouts = [self._rollout(number) for number in range(ROLLOUTS)]
        metrics = self._trainer.step(pack(rollouts, tokens_per_microbatch=1024))
        assert not metrics.skipped_steps
        pairs = list(zip(self.model.module.parameters(), before, strict=True))
        return sum(int((now != old).sum()) for now, old in pairs) / sum(old.numel() for old in before)

    def _rollout(self, number: int) -> Item:
        graph = TrajectoryGraph(str(number))
        start = int(self._random.integers(len(self._ids) - PROMPT - ANSWER))
        ids = self._ids[start : start + PROMPT + ANSWER]
        root = graph.add(None, TokenRun.given(ids[:PROMPT]), role="user", reason="append")
        answer = TokenRun.answer([], ids[PROMPT:], [-3.0] * ANSWER, [0] * ANSWER, "stop")
        node = graph.add(root.id, answer, role="assistant", reason="append")
        credit = NodeCredit(node.id, float(self._random.normal()), 0.0)
        return graph, RolloutCredit(graph.rollout_id, "text", (credit,), 1.0 / (ROLLOUTS * ANSWER))


class Published:
    """One of our ways."""

    def __init__(self, root: Path, form: Literal["full", "delta"], folder: Path, target: LoadedModel) -> None:
        self._settings, self._version = PublisherSettings(root, form), 0
        self._publisher, self._adoption = Publisher(folder), Adoption(target.module)
        self.num_bytes = 0

    def __call__(self, source: LoadedModel) -> Times:
        clock, self._version = Clock(), self._version + 1
        publication = self._publisher.publish(hugging_face_views(source.module).items(), self._version, self._settings)
        clock.lap("write")
        with self._adoption.checked(publication) as copy:
            clock.lap("read")
            copy()
            clock.lap("copy")
        self.num_bytes = publication.num_bytes
        return clock.times


class Saved:
    """safetensors through a file on the disk."""

    def __init__(self, root: Path, target: LoadedModel) -> None:
        self._root, self._version = root, 0
        self._target = dict(target.module.named_parameters())
        self.num_bytes = 0

    @torch.no_grad()
    def __call__(self, source: LoadedModel) -> Times:
        tensors = {name: parameter.detach().clone() for name, parameter in source.module.named_parameters()}
        self._version += 1
        path = self._root / f"{self._version}.safetensors"
        clock = Clock()
        save_file(tensors, path)
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
        clock.lap("write")
        loaded = load_file(path)
        clock.lap("read")
        for name, parameter in self._target.items():
            parameter.copy_(loaded[name])
        clock.lap("copy")
        self.num_bytes = path.stat().st_size
        (self._root / f"{self._version - 2}.safetensors").unlink(missing_ok=True)
        return clock.times


class Clock:
    def __init__(self) -> None:
        self.times: Times = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name], self._last = now - self._last, now


@torch.no_grad()
def clear(model: LoadedModel) -> None:
    for parameter in model.module.parameters():
        parameter.zero_()


def check(source: LoadedModel, target: LoadedModel, way: str) -> None:
    for (name, ours), theirs in zip(source.module.named_parameters(), target.module.parameters(), strict=True):
        if not torch.equal(ours.detach().view(torch.int16), theirs.detach().view(torch.int16)):
            raise RuntimeError(f"{way}: {name} is not what was published")


def measure(rounds: int, warm_up: int, disk: Path, shared: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    folder = resolve_model(MODEL)
    steps, target = Steps(folder), load_model(folder, dtype="bfloat16", device="cpu")
    ways: dict[str, Saved | Published] = {
        "disk": Saved(disk, target),
        "full": Published(disk / "full", "full", folder, target),
        "delta": Published(disk / "delta", "delta", folder, target),
        "shared": Published(shared / "full", "full", folder, target),
        "delta_shared": Published(shared / "delta", "delta", folder, target),
    }
    shares, times = [], {way: list[Times]() for way in ways}
    for number in range(warm_up + rounds):
        shares.append(steps.take())
        for way, found in timed(ways, steps.model, target):
            times[way].append(found)
        line = {way: round(sum(found[-1].values()), 3) for way, found in times.items()}
        print(f"round {number}: {line}", file=sys.stderr, flush=True)
    weights = sum(parameter.nbytes for parameter in target.module.parameters())
    figures = {way: summary(found[warm_up:]) for way, found in times.items()}
    return {
        "model": MODEL,
        **{f"{way}_s": found["seconds"] for way, found in figures.items()},
        "disk_over_shared": round(figures["disk"]["seconds"] / figures["shared"]["seconds"], 2),
        "delta_bytes_share": round(ways["delta"].num_bytes / weights, 4),
        "changed_share": round(statistics.median(shares[warm_up:]), 4),
        "probe_s": round(seconds_of(lambda: measured_probe(steps.model.module)), 4),
        "checksum_gb_s": checksum_speeds(steps.model.module.model.embed_tokens.weight),
        "first_shared_s": round(sum(times["shared"][0].values()), 3),
        "bytes": {"weights": weights, **{way: each.num_bytes for way, each in ways.items()}},
        "parts": {way: found["parts"] for way, found in figures.items()},
        "runs": {way: found["runs"] for way, found in figures.items()},
    }


def timed(
    ways: Mapping[str, Saved | Published], source: LoadedModel, target: LoadedModel
) -> Iterator[tuple[str, Times]]:
    for way, carry in ways.items():
        clear(target)
        found = carry(source)
        check(source, target, way)
        yield way, found


def summary(times: list[Times]) -> dict[str, Any]:
    sums = [sum(each.values()) for each in times]
    return {
        "seconds": round(statistics.median(sums), 4),
        "parts": {part: round(statistics.median(each[part] for each in times), 4) for part in times[0]},
        "runs": [round(each, 4) for each in sums],
    }


def checksum_speeds(weight: torch.Tensor) -> dict[str, float]:
    data = weight.detach().reshape(-1).view(torch.uint8).numpy()
    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: checksum(data),
        "crc32": lambda: zlib.crc32(data.data),
        "blake2b": lambda: hashlib.blake2b(data.data).digest(),
    }
    return {name: round(data.nbytes / seconds_of(way) / 1e9, 1) for name, way in ways.items()}


def seconds_of(work: Callable[[], object]) -> float:
    """The median of five."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="that are measured")
    parser.add_argument("--warm-up", type=int, default=4, help="rounds before them")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/publish.json")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="upspiral-publish-") as disk,
        tempfile.TemporaryDirectory(prefix="upspiral-publish-", dir="/dev/shm") as shared,
    ):
        figures = measure(options.rounds, options.warm_up, Path(disk), Path(shared))
    report("publish", figures, {"disk_over_shared": TARGET_RATIO}, save=options.save)


if __name__ == "__main__":
    main()
