"""Memory and time of an optimizer step, by what the trainer keeps.

    python benchmarks/trainer_memory.py [--save] [--only NAME ...] [--case a]

SmolLM2-135M in bfloat16 takes two steps on a case of `forest.py` (default: a prompt of 512 tokens and 16 answers of 64
as one microbatch), in a process of its own for each setting. `peak_mb` is what the process used at most beyond what it
used once the model was loaded; `step_s` the second step. One lane: memory is that of one microbatch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import psutil

from forest import CASES, MODEL
from result import report

SETTINGS: dict[str, dict[str, Any]] = {
    "all_weights": {},
    "activation_checkpointing": {"activation_checkpointing": True},
    "no_masters": {"master_weights": "none"},
    "lora": {"lora": {"rank": 16}},
    "no_masters_checkpointing": {"master_weights": "none", "activation_checkpointing": True},
    "lora_checkpointing": {"lora": {"rank": 16}, "activation_checkpointing": True},
}


def measure(setting: str, case: str) -> dict[str, Any]:
    import torch

    from upspiral.config.models import AlgorithmConfig, TrainerConfig
    from upspiral.trainer.forest import pack
    from upspiral.trainer.local import LocalTrainer
    from upspiral.weights.cpu import keep_freed_memory
    from upspiral.weights.load import load_model
    from upspiral.weights.models import resolve_model

    torch.manual_seed(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    loaded = load_model(resolve_model(MODEL), dtype="bfloat16", device="cpu")
    batches = pack(CASES[case](), tokens_per_microbatch=4096)
    before = psutil.Process().memory_info().rss
    config = TrainerConfig.model_validate(SETTINGS[setting])
    trainer = LocalTrainer(loaded.module, config, AlgorithmConfig(), temperature=1.0)
    steps = [trainer.step(batches) for _ in range(2)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"peak_mb": round(peak / 2**20), "step_s": round(steps[-1].seconds, 2), "tokens": steps[-1].unique_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), help="measure only these")
    parser.add_argument("--case", choices=list(CASES), default="a")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/trainer_memory.json")
    parser.add_argument("--setting", choices=list(SETTINGS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.setting:
        print(json.dumps(measure(options.setting, options.case)))
        return
    figures: dict[str, Any] = {"model": MODEL, "case": options.case}
    for setting in options.only or SETTINGS:
        command = [sys.executable, __file__, "--setting", setting, "--case", options.case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
        figures[setting] = json.loads(done.stdout.splitlines()[-1])
        print(setting, figures[setting], file=sys.stderr, flush=True)
    report("trainer_memory", figures, {}, save=options.save)


if __name__ == "__main__":
    main()
