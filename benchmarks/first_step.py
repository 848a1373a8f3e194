"""Seconds from `import upspiral` to the first finished optimizer step on a tiny model made here.

    python benchmarks/first_step.py [--save]

The run is a real one: config, agent process, gateway, engine, sandbox, verifier, forest batch, optimizer step. Making
the tiny model's folder is not counted; every import is. Median of five fresh processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from result import ROOT, report

REPEATS = 5
TARGET_S = 10.0
RECIPE = """
name = "first-step"
steps = 1
[model]
path = "{model}"
dtype = "float32"
[engine]
context_length = 128
[env]
kind = "python"
file = "{root}/tests/fixtures/letters_env.py"
[agent]
file = "{root}/tests/fixtures/one_call_agent.py"
max_completion_tokens = 6
[algorithm]
groups_per_step = 4
max_groups_per_step = 4
[eval]
tasks = 0
"""
CHILD = """
import time
started = time.monotonic()
import sys
from pathlib import Path
import upspiral
from upspiral.config.loader import load_run_config
from upspiral.loop.run import run_training
from upspiral.monitor.progress import LiveProgress

class FirstStep(LiveProgress):
    def step(self, line):
        print("seconds", time.monotonic() - started, flush=True)

config = load_run_config(Path(sys.argv[1]), ())
run_training(config, Path(sys.argv[2]), resume=False, progress=FirstStep("first-step", 1, quiet=True))
"""


def seconds_to_first_step(recipe: Path, run: Path) -> float:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(recipe), str(run)], capture_output=True, text=True, check=True, timeout=120
    )
    line = next(line for line in child.stdout.splitlines() if line.startswith("seconds "))
    return float(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/first_step.json")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.fixtures.tiny_model import make_model

    with tempfile.TemporaryDirectory(prefix="upspiral-first-step-") as temporary:
        folder = Path(temporary)
        recipe = folder / "first-step.toml"
        recipe.write_text(RECIPE.format(model=make_model(folder / "model"), root=ROOT))
        times = [seconds_to_first_step(recipe, folder / f"run-{repeat}") for repeat in range(REPEATS)]
    figures = {"seconds": round(statistics.median(times), 2), "runs": [round(time, 2) for time in times]}
    report("first_step", figures, {"seconds": TARGET_S}, save=options.save)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
