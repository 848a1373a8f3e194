"""Forward and backward of the trajectory graph, beside the same targets in flat rows: one row for each call.

    python benchmarks/forest.py [--save] [--only CASE ...] [--repeats 5]

SmolLM2-135M in bfloat16. Both forms run through the trainer's own model, loss and lanes; flat rows are packed side by
side without padding, up to the same tokens a microbatch. Forms take turns in one process; medians. Both are computed as
the trainer does it, with a lane for each core; flat rows are dealt to the lanes evenly, and up to FEW_TOKENS of them
are also timed in one lane that has all cores: the faster counts.

- `a`: a prompt of 512 tokens, 16 answers of 64. `b`: a group of 8 rollouts that share 2,048 tokens, then 64 each.
- `c_K`: one agent, K calls that send the history again, each with 16 new tokens, half of them sampled; `c64_K`: 64.
- `d`: tool tasks in the shape of tau2: 2 tasks x 4 rollouts, a policy and tools of 1,500 tokens that all share, 6 to 12
  calls each with 20 to 250 tokens of result and 20 to 120 of answer.

`ideal` is the counted work of the flat form over that of the graph: linear layers by tokens, the output layer by
targets, attention by pairs of query and key. `token_ratio` is the tokens of the flat form over those of the graph.
`ratio` is seconds over seconds. `fixed_s` is what a graph of two tokens takes: reading the weights and writing their
gradients, which both forms pay whatever they hold; of small graphs it is most of the time. `ratio_beyond_fixed` is the
ratio without it. Where the flat form has more than MOST_TOKENS tokens, every n-th of its rows is timed
(`flat_sample`: tokens timed over all) and the time scaled by counted work. Peaks are what a process of its own used at
most beyond model and imports; of many flat rows the longest are taken for it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from result import commit, report, saved_figures
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.trainer.flat import call_rows, side_by_side
from upspiral.trainer.forest import ForestBatch, Item, pack
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import NodeCredit, RolloutCredit

MODEL = "smollm2-135m"
TOKENS_PER_MICROBATCH = TrainerConfig().tokens_per_microbatch
MOST_TOKENS, SAMPLE_TOKENS = 10_240, 5_120
FEW_TOKENS = 2048
CALLS = (2, 4, 8, 16, 32, 64, 79, 128)


# The cases


class Maker:
    def __init__(self, name: str, vocabulary: int = 49_000) -> None:
        self.random = Random(name)
        self._vocabulary = vocabulary

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(self._vocabulary) for _ in range(count)]

    def given(self, graph: TrajectoryGraph, parent: int | None, ids: Sequence[int]) -> int:
        return graph.add(parent, TokenRun.given(ids), role="user", reason="append").id

    def answer(self, graph: TrajectoryGraph, parent: int, count: int) -> int:
        run = TokenRun.answer([], self.ids(count), [-1.0] * count, [0] * count, "stop")
        return graph.add(parent, run, role="assistant", reason="append").id

    def item(self, graph: TrajectoryGraph, group: str) -> Item:
        nodes = [NodeCredit(node.id, self.random.random(), 0.0) for node in graph.nodes if node.num_sampled]
        return graph, RolloutCredit(graph.rollout_id, group, tuple(nodes), 1e-3)


def answers_to_one_prompt(name: str, prompt: int, answers: int, length: int) -> list[Item]:
    maker, graph = Maker(name), TrajectoryGraph(name)
    root = maker.given(graph, None, maker.ids(prompt))
    for _ in range(answers):
        maker.answer(graph, root, length)
    return [maker.item(graph, name)]


def group(name: str, prompt: int, rollouts: int, length: int) -> list[Item]:
    maker, items = Maker(name), []
    ids = maker.ids(prompt)
    for number in range(rollouts):
        graph = TrajectoryGraph(f"{name}-{number}")
        maker.answer(graph, maker.given(graph, None, ids), length)
        items.append(maker.item(graph, name))
    return items


def one_agent(name: str, calls: int, length: int) -> list[Item]:
    maker, graph = Maker(name), TrajectoryGraph(name)
    last: int | None = None
    for _ in range(calls):
        last = maker.answer(graph, maker.given(graph, last, maker.ids(length // 2)), length // 2)
    return [maker.item(graph, name)]


def tool_tasks(name: str) -> list[Item]:
    maker, items = Maker(name), []
    policy = maker.ids(1500)
    for task in range(2):
        question = maker.ids(80)
        for number in range(4):
            graph = TrajectoryGraph(f"{name}-{task}-{number}")
            last = maker.given(graph, maker.given(graph, None, policy), question)
            for _ in range(maker.random.randint(6, 12)):
                last = maker.answer(graph, last, maker.random.randint(20, 120))
                last = maker.given(graph, last, maker.ids(maker.random.randint(20, 250)))
            items.append(maker.item(graph, f"{name}-{task}"))
    return items


CASES: dict[str, Callable[[], list[Item]]] = {
    "a": lambda: answers_to_one_prompt("a", 512, 16, 64),
    "b": lambda: group("b", 2048, 8, 64),
    "d": lambda: tool_tasks("d"),
    **{f"c_{calls}": lambda calls=calls: one_agent(f"c_{calls}", calls, 16) for calls in CALLS},
    **{f"c64_{calls}": lambda calls=calls: one_agent(f"c64_{calls}", calls, 64) for calls in CALLS},
}


# Counting


class Work:
    """Multiplications of forward and backward, of a model of this shape."""

    def __init__(self, config: Any) -> None:
        heads, size = config.num_attention_heads, config.head_dim
        width, inner = config.hidden_size, config.intermediate_size
        projections = 2 * width * heads * size + 2 * width * config.num_key_value_heads * size
        layers = config.num_hidden_layers
        # Backward costs twice the forward; the output layer's and attention's scores are computed once more there.
        self._token = 3 * layers * (projections + 3 * width * inner)
        self._target = 4 * width * config.vocab_size
        self._pair = layers * heads * size * 7

    def of(self, batches: Sequence[ForestBatch]) -> float:
        tokens = sum(batch.num_tokens for batch in batches)
        targets = sum(batch.num_targets for batch in batches)
        pairs = sum(int((batch.positions_T + 1).sum()) for batch in batches)
        return self._token * tokens + self._target * targets + self._pair * pairs


def sampled(rows: Sequence[ForestBatch]) -> Sequence[ForestBatch]:
    """Every n-th row, so that about SAMPLE_TOKENS tokens are left; as many short ones as long ones."""
    tokens = sum(row.num_tokens for row in rows)
    every = round(tokens / SAMPLE_TOKENS)
    return rows if tokens <= MOST_TOKENS else rows[every // 2 :: every]


def longest(rows: Sequence[ForestBatch], lanes: int) -> Sequence[ForestBatch]:
    """About SAMPLE_TOKENS tokens of the longest rows, one a lane at least: there the flat form's memory peaks."""
    if sum(row.num_tokens for row in rows) <= MOST_TOKENS:
        return rows
    by_length = sorted(rows, key=lambda row: row.num_tokens, reverse=True)
    return by_length[: max(lanes, -(-SAMPLE_TOKENS // by_length[0].num_tokens))]


# Measuring


class Bench:
    def __init__(self) -> None:
        import torch

        from upspiral.trainer.local import LocalTrainer
        from upspiral.weights.cpu import keep_freed_memory, num_cores, use_threads
        from upspiral.weights.load import load_model
        from upspiral.weights.models import resolve_model

        keep_freed_memory()
        torch.set_num_threads(1)
        use_threads(num_cores())
        loaded = load_model(resolve_model(MODEL), dtype="bfloat16", device="cpu")
        self.work = Work(loaded.config)
        self.lanes = num_cores()
        self._trainer = LocalTrainer(
            loaded.module, TrainerConfig(), AlgorithmConfig(), temperature=1.0, lanes=self.lanes
        )

    def graph(self, case: str) -> list[ForestBatch]:
        return pack(CASES[case](), tokens_per_microbatch=TOKENS_PER_MICROBATCH, lanes=self.lanes)

    def flat(self, case: str) -> tuple[list[list[ForestBatch]], float]:
        """The microbatches in the ways of dealing them that may be the fastest, and by what their time is to be
        multiplied."""
        rows = call_rows(CASES[case]())
        timed = sampled(rows)
        ways = [self.lanes] if sum(row.num_tokens for row in timed) > FEW_TOKENS else [1, self.lanes]
        return [self._dealt(timed, lanes) for lanes in ways], self.work.of(rows) / self.work.of(timed)

    def flat_at_its_peak(self, case: str) -> list[ForestBatch]:
        return self._dealt(longest(call_rows(CASES[case]()), self.lanes), self.lanes)

    def _dealt(self, rows: Sequence[ForestBatch], lanes: int) -> list[ForestBatch]:
        a_lane = max(-(-sum(row.num_tokens for row in rows) // lanes), max(row.num_tokens for row in rows))
        return side_by_side(rows, min(TOKENS_PER_MICROBATCH, a_lane), lanes)

    def seconds(self, batches: Sequence[ForestBatch]) -> float:
        """Of forward and backward of all microbatches, gradients added up."""
        return self._trainer.gradients(batches).seconds


def measure_times(case: str, repeats: int) -> dict[str, Any]:
    bench = Bench()
    graph, (ways, factor) = bench.graph(case), bench.flat(case)
    forms = [pack(one_agent("fixed", 1, 2), tokens_per_microbatch=TOKENS_PER_MICROBATCH), graph, *ways]
    for batches in forms:
        bench.seconds(batches[: bench.lanes])  # warm
    times = [[bench.seconds(batches) for batches in forms] for _ in range(repeats)]
    fixed_s, graph_s, *flat_s = (statistics.median(column) for column in zip(*times, strict=True))
    return {"fixed_s": fixed_s, "graph_s": graph_s, "flat_s": factor * min(flat_s)}


def count(case: str) -> dict[str, float]:
    from transformers import AutoConfig

    from upspiral.weights.models import resolve_model

    work, items = Work(AutoConfig.from_pretrained(resolve_model(MODEL))), CASES[case]()
    rows, packed = call_rows(items), pack(items, tokens_per_microbatch=TOKENS_PER_MICROBATCH)
    tokens = sum(row.num_tokens for row in rows)
    return {
        "ideal": work.of(rows) / work.of(packed),
        "token_ratio": tokens / sum(batch.num_tokens for batch in packed),
        "flat_sample": sum(row.num_tokens for row in sampled(rows)) / tokens,
    }


def measure_peak(case: str, form: str) -> dict[str, Any]:
    bench = Bench()
    batches = bench.graph(case) if form == "graph" else bench.flat_at_its_peak(case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bench.seconds(batches)
    return {"peak_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def in_a_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, repeats: int) -> dict[str, Any]:
    figures: dict[str, Any] = {**count(case), **in_a_process("--time", case, "--repeats", str(repeats))}
    graph_s, flat_s, fixed_s = (figures[name] for name in ("graph_s", "flat_s", "fixed_s"))
    figures["ratio"] = flat_s / graph_s
    figures["ratio_beyond_fixed"] = (flat_s - fixed_s) / (graph_s - fixed_s)
    return rounded({**figures, "commit": commit()})


def measure_peaks(case: str) -> dict[str, Any]:
    peaks = {form: in_a_process("--peak", case, "--form", form)["peak_mb"] for form in ("graph", "flat")}
    return rounded({"peak_mb": peaks["graph"], "flat_peak_mb": peaks["flat"], "peaks_commit": commit()})


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


def targets() -> dict[str, Any]:
    return {"share_of_ideal": 0.85, "cases": ["a", "b", "d", *(f"c_{k}" for k in CALLS if k <= 64)], "c_79": 28}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="of others the saved figures stay")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peaks", action="store_true", help="measure memory again, and no times")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/forest.json")
    parser.add_argument("--time", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--form", choices=("graph", "flat"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        print(json.dumps(measure_times(options.time, options.repeats)))
    elif options.peak:
        print(json.dumps(measure_peak(options.peak, options.form)))
    else:
        figures = saved_figures("forest")
        for case in options.only or CASES:
            timed = figures.get(case, {}) if options.peaks else measure(case, options.repeats)
            figures[case] = {**timed, **measure_peaks(case)}
            print(case, figures[case], file=sys.stderr, flush=True)
        report("forest", {**figures, "model": MODEL, "dtype": "bfloat16"}, targets(), save=options.save)


if __name__ == "__main__":
    main()
