"""One GRPO step of upspiral beside one of TRL's GRPOTrainer: SmolLM2-135M, the same prompts, reward, loss and threads.

    python benchmarks/step_vs_trl.py --trl-python PATH [--save] [--only SHAPE ...] [--dtypes bfloat16 float32]
        [--repeats 5] [--rows-per-pass N ...] [--clock wall|cpu]

A step is everything from prompts to new weights that the next one samples from: 4 prompts x 8 completions, reward and
advantages, forward and backward, AdamW, publication. Each side runs in a process of its own, one after the other, with
a thread for each core. TRL needs an environment of its own, whose interpreter `--trl-python` names. It was made with

    python -m venv trl && trl/bin/pip install torch==2.13.0 -c constraints.txt
    trl/bin/pip install torch==2.13.0 trl==1.16.0 -c constraints.txt

- `short`: prompts of 64 tokens, 64 sampled. `long`: prompts of 512. `turns`: prompts of 64, 4 calls with 64 sampled
  tokens each and between two calls a tool result of 64; each call sends the whole history.
- Prompts are stretches of the licence's text. Both sides sample exactly 64 tokens a call: TRL with `min_new_tokens`,
  upspiral without stop tokens.
- Both: temperature 1, AdamW with the same rates, clip and gradient norm, no KL; advantage = reward minus the group's
  mean; mean over tokens, then rollouts. In bfloat16 neither side keeps float32 weights: TRL's weights and moments are
  bfloat16 (its fastest form), upspiral's weights bfloat16 (`trainer.master_weights = "none"`) and its moments float32.
- TRL without gradient checkpointing and logging. `--rows-per-pass` rows go forward and backward at once and their
  gradients add up to one step; of several numbers the fastest counts and all are in `tried`. The default, 8, is TRL's.
  Without Triton its output layer scores the positions of prompts too (`add_fused_lm_head` in its source).
- TRL plays turns by a `rollout_func` that generates as its own loop over tool calls does. A row of its batch is then a
  call (its history and answer, what flat trainers compute: `turns_ratio`) or a rollout with the results masked (each
  token computed once in training: `turns_concatenated_ratio`).

`X_ratio` is TRL's seconds over ours, `X_peak_ratio` our largest memory over TRL's, `peak_ratio` the worst of these; a
process's peak holds imports and model. Seconds of phases: `generate`, `credit` (rewards, advantages, packing),
`forward_backward`, `update` (clipping and AdamW), `publish`. `computed_tokens` went through the model in training, each
side's padding included. Medians of `--repeats` steps after one that warms up (none for TRL with a row for each call);
fewer where they take more than two and a half minutes together: `timed_steps` says how many.

On a machine that others use, `taskset -c 0 ... --clock cpu` compares one core's seconds of computing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from result import ROOT, commit, report, saved_figures
from step_job import NEW_TOKENS, PROMPTS, Job, Row
from upspiral.weights.cpu import num_cores
from upspiral.weights.models import resolve_model

MODEL = "smollm2-135m"
SHAPES: dict[str, tuple[int, int]] = {"short": (64, 1), "long": (512, 1), "turns": (64, 4)}
"""Tokens of the prompt, calls."""
PEERS: dict[str, dict[str, Row]] = {
    "short": {"short": "completion"},
    "long": {"long": "completion"},
    "turns": {"turns": "call", "turns_concatenated": "rollout"},
}
"""TRL's rows for each ratio of a shape."""
PROMPT_STRIDE = 512
TARGETS = {"short_ratio": 3.0, "long_ratio": 8.0, "turns_ratio": 8.0, "peak_ratio": "at most 0.5"}


def jobs(shape: str, dtype: str, options: argparse.Namespace) -> dict[str, Job]:
    """What upspiral is asked ("ours") and what TRL for each ratio: the same, but for what a row is."""
    folder = resolve_model(MODEL)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    length, calls = SHAPES[shape]
    prompts = [token_ids[start : start + length] for start in range(0, PROMPTS * PROMPT_STRIDE, PROMPT_STRIDE)]
    rows: dict[str, Row] = {"ours": "rollout", **PEERS[shape]}
    return {
        name: Job(
            model_folder=str(folder),
            dtype=dtype,
            prompts=prompts,
            prompt_texts=[tokenizer.decode(prompt) for prompt in prompts],
            result_ids=token_ids,
            calls=calls,
            repeats=options.repeats,
            clock=options.clock,
            row=row,
        )
        for name, row in rows.items()
    }


def run_worker(python: str | Path, script: str, job: Job) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_cores())}
    command = [str(python), str(ROOT / "benchmarks" / script)]
    done = subprocess.run(
        command, input=job.to_json(), capture_output=True, text=True, timeout=3600, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script} {job.dtype}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_trl(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the fastest number of rows per pass, and under `tried` those of all."""
    tried = {}
    for rows in options.rows_per_pass:
        tried[rows] = run_worker(options.trl_python, "step_trl.py", job.with_rows(rows))
        print(job.dtype, job.row, rows, tried[rows], file=sys.stderr, flush=True)
    best = min(tried, key=lambda rows: tried[rows]["step_s"])
    brief = {str(rows): {name: figures[name] for name in ("step_s", "peak_mb")} for rows, figures in tried.items()}
    return {**tried[best], "rows_per_pass": best, "tried": brief}


def measure(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for shape in options.only:
        asked = jobs(shape, dtype, options)
        ours = run_worker(sys.executable, "step_ours.py", asked.pop("ours"))
        print(dtype, shape, ours, file=sys.stderr, flush=True)
        figures[f"ours_{shape}"] = {**ours, "commit": commit()}
        for name, job in asked.items():
            trl = measure_trl(job, options)
            assert trl["trained_tokens"] == ours["trained_tokens"], f"{name}: other work: {trl} {ours}"
            figures[f"trl_{name}"] = trl
            ratios[f"{name}_ratio"] = round(trl["step_s"] / ours["step_s"], 3)
            ratios[f"{name}_peak_ratio"] = round(ours["peak_mb"] / trl["peak_mb"], 3)
    return {**ratios, **figures}


def with_worst_peak(figures: dict[str, Any]) -> dict[str, Any]:
    peaks = [value for name, value in figures.items() if name.endswith("_peak_ratio")]
    return {**figures, "peak_ratio": max(peaks)}


def check_environment(python: Path) -> None:
    """Ends the program with what to do when the interpreter has not the TRL that the figures are about."""
    worker = ROOT / "benchmarks" / "step_trl.py"
    try:
        done = subprocess.run([str(python), str(worker), "--check"], capture_output=True, text=True, timeout=300)
        problem = (done.stderr.strip().splitlines() or ["it ends with an error"])[-1] if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        sys.exit(f"--trl-python {python}: {problem}; make the environment as `{Path(__file__).name} --help` says")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True, help="the interpreter of an environment with TRL")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/step_vs_trl.json; what is not measured now stays"
    )
    parser.add_argument("--only", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="measure only these")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"], choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows-per-pass", type=int, nargs="*", default=[8])
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    check_environment(options.trl_python)
    figures = saved_figures("step_vs_trl")
    for dtype in options.dtypes:
        figures[dtype] = with_worst_peak({**figures.get(dtype, {}), **measure(dtype, options)})
    report(
        "step_vs_trl",
        {**figures, "model": MODEL, "new_tokens": NEW_TOKENS, "threads": num_cores(), "clock": options.clock},
        TARGETS,
        save=options.save,
    )


if __name__ == "__main__":
    main()
