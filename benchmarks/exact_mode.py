"""The whole demo with `engine.exact`: how far the engine's log-probabilities are from the trainer's, and what it costs.

    python benchmarks/exact_mode.py [--dtypes bfloat16 float32] [--steps 36] [--cost-steps 4] [--seed 0]
        [--runs DIR] [--save]

- `max_difference`: the largest |logp(engine) - logp(trainer)| over all trained tokens of all steps of the demo recipe,
  nats; the target is exactly 0.0. Batches are composed as agents happen to call: `rollouts` of them, 96 at a time.
  Held-out success before and after is given as `demo.py` gives it.
- `default_max_difference` is the same with the default engine over the first COST_STEPS steps, and `cost` how many
  times as long exact mode takes for these: medians of seconds a step, of two runs of their own, one after the other,
  from the same seed. `cost_collect` and `cost_train` are its parts.

`--steps 0` or `--cost-steps 0` leaves a part out; what is saved of it stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from demo import summary
from result import ROOT, commit, report, saved_figures
from upspiral.monitor.metrics import read_metrics

RECIPE = ROOT / "recipes" / "demo.toml"
LIMIT_S = 3 * 3600.0


def run(folder: Path, dtype: str, steps: int, seed: int, *further: str) -> list[dict[str, Any]]:
    """The lines of the steps of one run in a process of its own."""
    command = [sys.executable, "-m", "upspiral", "run", str(RECIPE), "--run", str(folder), "--steps", str(steps)]
    command += ["--model.dtype", dtype, "--seed", str(seed), "--env.seed", str(seed), "--budget_minutes", "180"]
    subprocess.run([*command, *further], check=True, timeout=LIMIT_S, stdout=sys.stderr)
    lines = [line for line in read_metrics(folder) if line["kind"] == "step"]
    if len(lines) != steps:
        raise RuntimeError(f"{folder} has {len(lines)} steps, not {steps}")
    return lines


def largest(lines: list[dict[str, Any]]) -> float:
    """Steps in which no group had a signal trained no token and have nothing to compare."""
    return max(line["mismatch_max_abs"] for line in lines if line["trained_tokens"])


def whole(folder: Path, dtype: str, steps: int, seed: int) -> dict[str, Any]:
    lines = run(folder / f"{dtype}-whole", dtype, steps, seed, "--engine.exact", "true")
    return {
        "max_difference": largest(lines),
        "steps": len(lines),
        "rollouts": sum(line["rollouts"] for line in lines),
        "trained_tokens": sum(line["trained_tokens"] for line in lines),
        "whole_seed": seed,
        "whole_commit": commit(),
        **summary(folder / f"{dtype}-whole"),
    }


def cost(folder: Path, dtype: str, steps: int, seed: int) -> dict[str, Any]:
    unevaluated = ("--eval.tasks", "1", "--eval.every", "0")
    default = run(folder / f"{dtype}-default", dtype, steps, seed, *unevaluated)
    exact = run(folder / f"{dtype}-exact", dtype, steps, seed, *unevaluated, "--engine.exact", "true")
    figures: dict[str, Any] = {"default_max_difference": largest(default), "cost_steps": steps, "cost_commit": commit()}
    for name, part in (("cost", "total"), ("cost_collect", "collect"), ("cost_train", "train")):
        seconds = [median(line["seconds"][part] for line in lines) for lines in (exact, default)]
        figures[name] = round(seconds[0] / seconds[1], 3)
        figures[f"{name}_seconds"] = [round(each, 2) for each in seconds]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--steps", type=int, default=36, help="of the whole run")
    parser.add_argument("--cost-steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="where the run folders go; default: a temporary folder")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/exact_mode.json")
    options = parser.parse_args()
    runs = options.runs or Path(tempfile.mkdtemp(prefix="upspiral-exact-"))
    figures = saved_figures("exact_mode")
    for dtype in options.dtypes:
        found = figures.setdefault(dtype, {})
        if options.steps:
            found |= whole(runs, dtype, options.steps, options.seed)
        if options.cost_steps:
            found |= cost(runs, dtype, options.cost_steps, options.seed)
    report("exact_mode", figures, {"max_difference": 0.0, "cost": 1.3}, save=options.save)


if __name__ == "__main__":
    main()
