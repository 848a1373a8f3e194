"""What `upspiral plan` foretells beside what is measured, in the same run on the same machine.

    python benchmarks/plan.py [--save] [--only NAME ...] [--repeats 3] [--small] [--threads N] [--cpu-time]

Each case is a part of a run file. The plan's own functions (launch/plan/) say what it takes, from the model's
config.json and rates that they measure here; then a process of its own does it.

- `step_bfloat16`: engine and local trainer of SmolLM2-135M in one process, as in the demo: GROUPS x ROLLOUTS rollouts
  of one answer, then the step. `step_checkpointing`: with `trainer.activation_checkpointing`. `train_float32`: the
  trainer alone. `train_moe`: a random mixture of experts of 98 million weights, 42 million for a token.
- `ranks_bfloat16`: two FSDP ranks; memory is that of one rank, the largest.
- `decode_1`, `decode_8`, `decode_32`: the embedded engine alone, so many sequences.
- `publish_shared`, `publish_delta`: from the trainer's weights to those of another module, in shared memory.

Of each: `predicted` and `measured` by part, memory in MB (peak resident size of the process, imports included), time in
seconds (medians of REPEATS after a warm-up), and `ratio`, predicted over measured. `worst_memory` and `worst_time` are
the ratios farthest from 1, whichever way.

Targets: memory within 15 %, as the plan counts on nine tenths of a device and must not go far beyond what it leaves;
time within 1.5 times, which tells splits apart that differ by factors, and not machines of one name, which differ by a
third. Parts below SHORTEST_S are shown and not judged.

On a machine that others use, `--cpu-time` counts CPU seconds instead of the clock's; let it have one core then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from result import report
from upspiral.config.models import RunConfig
from upspiral.launch.plan.load import StepLoad

MODEL = "smollm2-135m"
GROUPS, ROLLOUTS, PROMPT, ANSWER = 4, 8, 128, 64
LOAD = StepLoad(GROUPS, ROLLOUTS, 1, PROMPT, ANSWER, 0)
MEMORY_TARGET, TIME_TARGET = 1.15, 1.5
SHORTEST_S = 0.02
TIMEOUT_S = 1200.0
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 1024,
    "moe_intermediate_size": 384, "num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "decoder_sparse_step": 1,
    "tie_word_embeddings": True, "max_position_embeddings": 2048, "norm_topk_prob": True, "dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`measure`: what a process of its own does; `parts`: of the plan's seconds, which of them, by what they are called
    in the measurement."""

    measure: Callable[[Case, Path, Clock], dict[str, float]]
    memory: str
    """Whose memory is compared: "trainer", "engine", "both" or "" for nobody's."""
    parts: dict[str, tuple[str, ...]]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    load: StepLoad = LOAD
    experts: bool = False

    @property
    def config(self) -> RunConfig:
        """The part of a run file."""
        return RunConfig.model_validate({"agent": {"command": "true"}, **self.sections})


@dataclass
class Clock:
    now: Callable[[], float]
    repeats: int

    def median(self, work: Callable[[], object]) -> float:
        """After one that warms up."""
        return statistics.median([self.once(work) for _ in range(self.repeats + 1)][1:])

    def once(self, work: Callable[[], object]) -> float:
        started = self.now()
        work()
        return self.now() - started


# What is measured


def measure_step(case: Case, folder: Path, clock: Clock) -> dict[str, float]:
    """Engine and trainer share weights and thread."""
    from upspiral.engine.embedded.engine import EmbeddedEngine
    from upspiral.trainer.local import LocalTrainer

    model = loaded(case, folder)
    trainer = LocalTrainer.of(model.module, setup(case, folder), lanes=threads_of(case), exact=False)
    engine = EmbeddedEngine(model, case.config.engine, seed=0, threads=threads_of(case))
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        times = sampled(case, engine, runner, clock) | trained(
            case, trainer, clock, lambda work: runner.run(engine.exclusive(work))
        )
        runner.run(engine.stop())
    return times


def measure_train(case: Case, folder: Path, clock: Clock) -> dict[str, float]:
    from upspiral.trainer.local import LocalTrainer
    from upspiral.weights.cpu import use_threads

    use_threads(threads_of(case))
    model = loaded(case, folder)
    trainer = LocalTrainer.of(model.module, setup(case, folder), lanes=threads_of(case), exact=False)
    return trained(case, trainer, clock, lambda work: work())


def measure_engine(case: Case, folder: Path, clock: Clock) -> dict[str, float]:
    from upspiral.engine.embedded.engine import EmbeddedEngine

    engine = EmbeddedEngine(loaded(case, folder), case.config.engine, seed=0, threads=threads_of(case))
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        times = sampled(case, engine, runner, clock)
        runner.run(engine.stop())
    return times


def measure_ranks(case: Case, folder: Path, clock: Clock) -> dict[str, float]:
    """The seconds of a step, and the peak of the larger rank."""
    from upspiral.trainer.rank_processes import start_ranks
    from upspiral.trainer.ranks import Ranks

    with tempfile.TemporaryDirectory(prefix="upspiral-plan-") as logs:
        assert case.config.trainer.parallel is not None
        count = case.config.trainer.parallel.ranks
        before = {child.pid for child in psutil.Process().children()}
        ranks = Ranks(start_ranks(count, Path(logs)), "fsdp", setup(case, folder))
        try:
            processes = [child for child in psutil.Process().children() if child.pid not in before]
            if clock.now is time.process_time:
                clock.now = lambda: sum(sum(each.cpu_times()[:2]) for each in processes)
            step = clock.median(lambda: ranks.step(batches(case, lanes=count)))
            peak = max(peak_mb(each.pid) for each in processes)
        finally:
            ranks.close()
    return {"step": step, "peak_mb": peak}


def measure_publish(case: Case, folder: Path, clock: Clock) -> dict[str, float]:
    import torch

    from upspiral.engine.embedded.adoption import Adoption
    from upspiral.weights.names import hugging_face_tensors
    from upspiral.weights.publication import PublisherSettings
    from upspiral.weights.publisher import Publisher

    source, target = loaded(case, folder).module, loaded(case, folder).module
    publisher, adoption, versions = Publisher(folder), Adoption(target), iter(range(1000))
    tied = source.config.tie_word_embeddings

    def publish() -> None:
        tensors = hugging_face_tensors(source.named_parameters(), tied=tied)
        with adoption.checked(publisher.publish(tensors, next(versions), settings)) as copy:
            copy()

    @torch.no_grad()
    def changed() -> float:
        """After a change of about a fiftieth of the elements, as by a step."""
        for parameter in source.parameters():
            parameter.view(-1)[::50] *= 1.01
        return clock.once(publish)

    with tempfile.TemporaryDirectory(prefix="upspiral-plan-", dir="/dev/shm") as root:
        settings = PublisherSettings(Path(root), case.config.weights.form)
        return {"publish": statistics.median([changed() for _ in range(5 + clock.repeats)][5:])}


def sampled(case: Case, engine: Any, runner: asyncio.Runner, clock: Clock) -> dict[str, float]:
    """Seconds until all first tokens are there, less the step that samples them, and of as many steps as tokens."""
    from upspiral.types import SamplingParams

    maker = Random(0)

    async def one(prompt: list[int], count: int) -> None:
        async for _ in engine.generate(prompt, SamplingParams(max_tokens=count)):
            pass

    async def all_of(prompts: list[list[int]], count: int) -> None:
        # The first of a group computes its prompt, which the others then find.
        await asyncio.gather(*(one(prompt, count) for prompt in prompts for _ in range(case.load.group_size)))

    def work(count: int) -> Callable[[], None]:
        return lambda: runner.run(all_of([maker.ids(PROMPT) for _ in range(case.load.groups)], count))

    first, count = clock.median(work(1)), case.load.answer_tokens
    step = (clock.median(work(count)) - first) / (count - 1)
    return {"prefill": first - step, "decode": step * count}


def trained(case: Case, trainer: Any, clock: Clock, run: Callable[[Callable[[], object]], object]) -> dict[str, float]:

    given, update, updates = batches(case, lanes=threads_of(case)), trainer._update, list[float]()
    trainer._update = lambda *args: updates.append(clock.once(lambda: update(*args)))
    step = clock.median(lambda: run(lambda: trainer.step(given)))
    optimize = statistics.median(updates[1:])
    return {"train": step - optimize, "optimize": optimize}


def batches(case: Case, lanes: int) -> Any:
    from upspiral.trainer.forest import pack
    from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
    from upspiral.types import NodeCredit, RolloutCredit

    maker, items, load = Random(1), [], case.load
    for group in range(load.groups):
        prompt = maker.ids(load.prompt_tokens)
        for number in range(load.group_size):
            graph = TrajectoryGraph(f"{group}-{number}")
            root = graph.add(None, TokenRun.given(prompt), role="user", reason="root")
            run = TokenRun.answer([], maker.ids(load.answer_tokens), [-1.0] * load.answer_tokens,
                                  [0] * load.answer_tokens, "stop")  # fmt: skip
            answer = graph.add(root.id, run, role="assistant", reason="append")
            credit = NodeCredit(answer.id, (-1.0) ** number, 0.0)
            items.append((graph, RolloutCredit(graph.rollout_id, str(group), (credit,), 1e-3)))
    return pack(items, tokens_per_microbatch=case.config.trainer.tokens_per_microbatch, lanes=lanes)


class Random:
    def __init__(self, seed: int) -> None:
        from random import Random as Source

        self._source = Source(seed)

    def ids(self, count: int) -> list[int]:
        return [self._source.randrange(3, 30000) for _ in range(count)]


def threads_of(case: Case) -> int:
    from upspiral.loop.placement import num_threads

    return num_threads(case.config)


def loaded(case: Case, folder: Path) -> Any:
    from upspiral.weights.load import load_model

    return load_model(folder, dtype=case.config.model.dtype, device="cpu")


def setup(case: Case, folder: Path) -> Any:
    from upspiral.loop.placement import trainer_setup

    return trainer_setup(case.config, folder)


def write_experts(folder: Path) -> Path:
    """A random mixture of experts."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**EXPERTS)).save_pretrained(folder)
    return folder


# What is predicted


def predicted(case: Case, folder: Path, clock: Clock) -> dict[str, float]:
    from upspiral.launch.plan.device import this_cpu
    from upspiral.launch.plan.memory import engine_bytes
    from upspiral.launch.plan.plan import Plan
    from upspiral.launch.plan.shape import ModelShape

    shape = ModelShape.of_folder(folder)
    device = this_cpu(shape, case.config.model.dtype, now=clock.now)
    plan = Plan.of(shape, case.config, case.load, device)
    found = {part: sum(plan.seconds[each] for each in own) for part, own in case.parts.items()}
    if case.memory:
        parts = {"trainer": plan.trainer, "both": plan.needed, "engine": engine_bytes(shape, case.config, device)}
        found["peak_mb"] = sum(parts[case.memory].values()) / 2**20
    return found


CASES: dict[str, Case] = {}


def engine(running: int, **changes: Any) -> dict[str, Any]:
    return {"max_running": running, "cache_slots": max(running, 2), "context_length": 256, **changes}


SAMPLES = {"prefill": ("prefill",), "decode": ("decode",)}
TRAINS = {"train": ("train",), "optimize": ("optimize",)}
RANKS = {"trainer": {"kind": "fsdp", "parallel": {"ranks": 2}}}
ALL = GROUPS * ROLLOUTS
CASES["step_bfloat16"] = Case(measure_step, "both", SAMPLES | TRAINS, {"engine": engine(ALL)})
CASES["step_checkpointing"] = Case(
    measure_step, "both", SAMPLES | TRAINS, {"engine": engine(ALL), "trainer": {"activation_checkpointing": True}}
)
CASES["train_float32"] = Case(measure_train, "trainer", TRAINS, {"model": {"dtype": "float32"}})
CASES["train_moe"] = Case(measure_train, "trainer", TRAINS, {"model": {"dtype": "float32"}}, experts=True)
CASES["ranks_bfloat16"] = Case(measure_ranks, "trainer", {"step": ("train", "communicate", "optimize")}, RANKS)
for _running in (1, 8, 32):
    CASES[f"decode_{_running}"] = Case(
        measure_engine, "engine", {"decode": ("decode",)}, {"engine": engine(_running)},
        StepLoad(_running, 1, 1, PROMPT, ANSWER, 0),
    )  # fmt: skip
for _form in ("full", "delta"):
    _sections = RANKS | {"weights": {"form": _form}}
    CASES[f"publish_{_form}"] = Case(measure_publish, "", {"publish": ("publish",)}, _sections)


# The processes


def peak_mb(process_id: int) -> float:
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no peak of process {process_id}")


def child(name: str, folder: Path, options: argparse.Namespace) -> None:
    import torch

    from upspiral.weights.cpu import keep_freed_memory

    torch.manual_seed(0)
    torch.set_num_threads(1)  # as a run does it; the threads that compute take the cores
    keep_freed_memory()
    case = case_of(name, options)
    measured = case.measure(case, folder, clock_of(options))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mb": own} | measured), flush=True)
    sys.stdout.flush()
    os._exit(0)  # engines leave threads behind


def case_of(name: str, options: argparse.Namespace) -> Case:
    case, sections = CASES[name], dict(CASES[name].sections)
    if options.threads:
        sections["model"] = {**sections.get("model", {}), "threads": options.threads}
    load = replace(case.load, groups=min(2, case.load.groups), answer_tokens=16) if options.small else case.load
    return replace(case, load=load, sections=sections)


def clock_of(options: argparse.Namespace) -> Clock:
    return Clock(time.process_time if options.cpu_time else time.perf_counter, options.repeats)


def compared(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    case = case_of(name, options)
    words = ["--repeats", str(options.repeats)]
    words += ["--threads", str(options.threads)]
    words += [f"--{each.replace('_', '-')}" for each in ("cpu_time", "small") if getattr(options, each)]
    before = predicted(case, folder, clock_of(options))
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    measured = {part: found[part] for part in before}
    return {
        "predicted": {part: float(f"{value:.3g}") for part, value in before.items()},
        "measured": {part: float(f"{value:.3g}") for part, value in measured.items()},
        "ratio": {part: round(before[part] / measured[part], 2) for part in before},
    }


def worst(figures: dict[str, Any], *, memory: bool) -> float:
    ratios = [
        each["ratio"][part] for each in figures.values() for part in each["ratio"]
        if (part == "peak_mb") == memory and (memory or each["measured"][part] >= SHORTEST_S)
    ]  # fmt: skip
    return max(ratios, key=lambda ratio: max(ratio, 1 / ratio), default=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="these cases alone")
    parser.add_argument("--repeats", type=int, default=3, help="the median of how many")
    parser.add_argument("--small", action="store_true", help="fewer and shorter rollouts: to see that it works")
    parser.add_argument("--threads", type=int, default=0, help="that compute; 0: one a core")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds; meant for one core")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/plan.json")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.folder, options)
    from upspiral.weights.models import resolve_model

    figures: dict[str, Any] = {}
    started, model = time.monotonic(), resolve_model(MODEL)
    with tempfile.TemporaryDirectory(prefix="upspiral-plan-") as work:
        for name in options.only or CASES:
            folder = write_experts(Path(work)) if CASES[name].experts else model
            figures[name] = compared(name, folder, options)
            print(name, json.dumps(figures[name]), file=sys.stderr, flush=True)
    summary = {"worst_memory": worst(figures, memory=True), "worst_time": worst(figures, memory=False)}
    figures |= summary | {"minutes": round((time.monotonic() - started) / 60, 1)}
    targets = {"worst_memory": f"within {MEMORY_TARGET} times", "worst_time": f"within {TIME_TARGET} times"}
    report("plan", figures, targets, save=options.save)


if __name__ == "__main__":
    main()
