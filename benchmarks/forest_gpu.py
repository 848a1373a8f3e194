"""Forward and backward of the trajectory graph beside the same targets in flat rows, on a GPU with paths of 32k tokens.

    python benchmarks/forest_gpu.py [--save] [--only CASE ...] [--repeats 5]

A model of Qwen3-0.6B's shape with random weights, in bfloat16; attention is FlexAttention for both forms. Both run
through the trainer's own model and loss, in microbatches of at most 32,768 tokens; flat rows, one for each call, are
packed side by side without padding. Layers are computed again in the backward pass, as one would do at this length
(`trainer.activation_checkpointing`). Forms take turns in one process; medians.

- `group`: 8 rollouts that share 28,672 tokens, then 4,096 each.
- `agent`: one agent, 32 calls that send the history again, each with 1,024 new tokens, half of them sampled.

`ideal` and `token_ratio`: as in benchmarks/forest.py. Peaks are the most that torch had allocated, the model included.
`compile_s` is what the first pass over a form took, with FlexAttention's compilation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from forest import Work, group, one_agent
from result import report
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.trainer.flat import call_rows, side_by_side
from upspiral.trainer.forest import ForestBatch, Item, pack
from upspiral.trainer.local import LocalTrainer

TOKENS_PER_MICROBATCH = 32_768
SHAPE: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
CASES: dict[str, Callable[[], list[Item]]] = {
    "group": lambda: group("group", 28_672, 8, 4096),
    "agent": lambda: one_agent("agent", 32, 1024),
}


class Bench:
    def __init__(self, device: str, shape: dict[str, Any]) -> None:
        torch.manual_seed(0)
        config = Qwen3Config(**shape)
        self.work = Work(config)
        model: Any = Qwen3ForCausalLM(config)
        trainer = TrainerConfig(activation_checkpointing=True)
        self._trainer = LocalTrainer(model.to(device, torch.bfloat16), trainer, AlgorithmConfig(), temperature=1.0)

    def seconds(self, batches: Sequence[ForestBatch]) -> float:
        """Of forward and backward of all microbatches, gradients added up."""
        torch.cuda.synchronize()
        started = time.monotonic()
        self._trainer.gradients(batches)
        torch.cuda.synchronize()
        return time.monotonic() - started

    def peak_mb(self, batches: Sequence[ForestBatch]) -> float:
        torch.cuda.reset_peak_memory_stats()
        self.seconds(batches)
        return torch.cuda.max_memory_allocated() / 2**20


def measure(bench: Bench, items: list[Item], repeats: int) -> dict[str, float]:
    rows, packed = call_rows(items), pack(items, tokens_per_microbatch=TOKENS_PER_MICROBATCH)
    forms = [packed, side_by_side(rows, TOKENS_PER_MICROBATCH)]
    compiling = [bench.seconds(batches) for batches in forms]
    times = [[bench.seconds(batches) for batches in forms] for _ in range(repeats)]
    graph_s, flat_s = (statistics.median(column) for column in zip(*times, strict=True))
    peak_mb, flat_peak_mb = (bench.peak_mb(batches) for batches in forms)
    figures = {
        "ideal": bench.work.of(rows) / bench.work.of(packed),
        "token_ratio": sum(row.num_tokens for row in rows) / sum(batch.num_tokens for batch in packed),
        "graph_s": graph_s,
        "flat_s": flat_s,
        "ratio": flat_s / graph_s,
        "peak_mb": peak_mb,
        "flat_peak_mb": flat_peak_mb,
        "compile_s": compiling[0],
    }
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CASES), help="measure only these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/forest_gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA device, and torch {torch.__version__} sees none; on a CPU: benchmarks/forest.py")
    bench = Bench("cuda", SHAPE)
    figures: dict[str, Any] = {}
    for case in options.only or CASES:
        figures[case] = measure(bench, CASES[case](), options.repeats)
        print(case, figures[case], file=sys.stderr, flush=True)
    setting = {"model": "Qwen3-0.6B's shape, random weights", "dtype": "bfloat16", "torch": torch.__version__}
    gpu = torch.cuda.get_device_name()
    report("forest_gpu", {**figures, **setting, "gpu": gpu}, {"share_of_ideal": 0.85}, save=options.save)


if __name__ == "__main__":
    main()
