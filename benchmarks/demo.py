"""Reruns the demo for several seeds and reports how much RL alone added on held-out tasks.

    python benchmarks/demo.py --seeds 3 [--save] [--recipe demo_vllm]

Figures, per seed: `warm` and `final` (held-out success after the warm start and after RL), their 95 % intervals,
`minutes` that the run's own lines add up to, the ledger, the learning curve, and of each step the mean difference
between the engine's log-probabilities and the trainer's (`mismatch`), with the largest share of tokens that the
correction cut off. Needs the default model (`upspiral model get smollm2-135m`), and for the recipe `demo_vllm`
vLLM's environment (`upspiral engine install vllm`). With `--runs DIR` an interrupted benchmark goes on: seeds that
finished there are not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from result import ROOT, report
from upspiral.monitor.metrics import read_metrics

LIMIT_MINUTES = 15.0
"""Of the recipe `demo`."""
TIMEOUT_S = 3600.0


def run_seed(recipe: str, seed: int, folder: Path) -> dict[str, Any]:
    """One demo run in a process of its own, as `make demo` runs it; the figures of an earlier one if it finished."""
    if not (folder / "report.html").exists():
        file = ROOT / "recipes" / f"{recipe}.toml"
        command = [sys.executable, "-m", "upspiral", "run", str(file), "--run", str(folder), "--seed", str(seed)]
        subprocess.run([*command, "--env.seed", str(seed)], check=True, timeout=TIMEOUT_S)
    return summary(folder)


def summary(folder: Path) -> dict[str, Any]:
    lines = read_metrics(folder)
    evaluations = sorted((line for line in lines if line["kind"] == "eval"), key=lambda line: line["step"])
    steps = [line for line in lines if line["kind"] == "step"]
    first, last = evaluations[0], evaluations[-1]
    return {
        "minutes": round(sum(map(_seconds, lines)) / 60, 2),
        "warm": first["rate"],
        "warm_interval": [first["low"], first["high"]],
        "final": last["rate"],
        "final_interval": [last["low"], last["high"]],
        "points": round(100 * (last["rate"] - first["rate"]), 1),
        "intervals_apart": last["low"] > first["high"],
        "tasks": last["tasks"],
        "two_or_more_calls": sum(n for level, (n, _) in last["by_difficulty"].items() if int(level) >= 2),
        "curve": [[line["step"], line["rate"], line["low"], line["high"]] for line in evaluations],
        "rewards": [round(line["reward_mean"], 3) for line in steps],
        "effective_batch": [line["effective_batch"] for line in steps],
        "mismatch": [round(line.get("mismatch_mean_abs") or 0.0, 5) for line in steps],
        "most_capped": max(line.get("mismatch_capped") or 0.0 for line in steps),
        "ledger": _ledger(steps),
        "ledger_closed_every_step": all(line["ledger"]["difference"] == 0 for line in steps),
    }


def _seconds(line: dict[str, Any]) -> float:
    seconds = line.get("seconds", 0.0)
    return seconds["total"] if isinstance(seconds, dict) else seconds


def _ledger(steps: list[dict[str, Any]]) -> dict[str, int]:
    total = {"sampled": 0, "trained": 0, "masked": 0, "dropped": 0}
    for line in steps:
        ledger = line["ledger"]
        total["sampled"] += ledger["sampled"]
        total["trained"] += ledger["trained"]
        total["masked"] += sum(ledger["masked"].values())
        total["dropped"] += sum(ledger["dropped"].values())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 ... N-1")
    parser.add_argument("--runs", type=Path, default=None, help="where the run folders go; default: a temporary folder")
    parser.add_argument("--recipe", choices=["demo", "demo_vllm"], default="demo")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/RECIPE.json")
    options = parser.parse_args()
    runs = options.runs or Path(tempfile.mkdtemp(prefix="upspiral-demo-"))
    figures = {f"seed_{seed}": run_seed(options.recipe, seed, runs / f"seed-{seed}") for seed in range(options.seeds)}
    targets = {"points": 20, "intervals_apart": True, "ledger_closed_every_step": True}
    if options.recipe == "demo":
        targets["minutes"] = LIMIT_MINUTES
    report(options.recipe, figures, targets, save=options.save)


if __name__ == "__main__":
    main()
