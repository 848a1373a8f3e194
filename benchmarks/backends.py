"""A training step of each backend on one device: forest beside flat, and transformers' own Trainer beside both.

    python benchmarks/backends.py [--save] [--model smollm2-135m|0.5b|4b|tiny] [--device cpu|cuda] [--only WAY ...]
        [--repeats 5] [--checkpointing]

A step trains on GROUPS groups of ROLLOUTS rollouts, each a prompt that the group shares and an answer that was sampled:
forward, backward with a clipped policy gradient, clipping, AdamW with float32 weights and bfloat16 products. Every way
runs in a process of its own on one device: medians of `--repeats` steps after one that warms up.

- `local`, `fsdp`, `deepspeed` (ZeRO 2), `megatron`: ours with one rank; `X_forest` packs what rollouts share once,
  `X_flat` has a row for each rollout, side by side without padding.
- `transformers`: its Trainer with a row for each rollout (all of one length, so without padding), its SDPA attention,
  autocast to bfloat16 and fused AdamW where there is CUDA. As many rows a pass as fit the same tokens a microbatch, and
  those passes are accumulated to one step. `compute_loss` scores the sampled positions alone.

`step_s`; `targets_per_s`: sampled tokens a second, the same work for all; `peak_mb`: the most that torch had allocated
on CUDA, the process's peak on a CPU. `ratio` of our ways: transformers' seconds over theirs. Models other than
`smollm2-135m` have random weights: `0.5b` and `4b` in Qwen3's shape. `--checkpointing`: all ways compute layers again.

On a CPU, Megatron-core runs by a shim made for tests (trainer/megatron/cpu.py): its time there says nothing about it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from forest import group
from result import report
from upspiral.config.models import AlgorithmConfig, ParallelConfig, TrainerConfig
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.flat import flatten, side_by_side
from upspiral.trainer.forest import ForestBatch, Item, pack
from upspiral.trainer.local import LocalTrainer
from upspiral.trainer.rank import RankProgram
from upspiral.weights.cpu import keep_freed_memory, num_cores
from upspiral.weights.load import load_model
from upspiral.weights.models import resolve_model

GROUPS, ROLLOUTS = 4, 8
LENGTHS = {"cpu": (192, 64, 1024), "cuda": (1024, 1024, 16_384)}
"""Tokens of a prompt, of an answer, and of a microbatch."""
LEARNING_RATE, CLIP = 2e-5, 0.2
KINDS = ("local", "fsdp", "deepspeed", "megatron")
WAYS = ("transformers", *(f"{kind}_{form}" for kind in KINDS for form in ("forest", "flat")))
_QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _QWEN3 | {
        "vocab_size": 50_000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 8, "head_dim": 16,
    },
    "0.5b": _QWEN3 | {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "4b": _QWEN3 | {
        "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}  # fmt: skip
TIMEOUT_S = 1800.0


def rollouts(device: str) -> list[Item]:
    prompt, answer, _ = LENGTHS[device]
    return [item for number in range(GROUPS) for item in group(f"group-{number}", prompt, ROLLOUTS, answer)]


def forest_batches(way: str, items: Sequence[Item], device: str) -> list[ForestBatch]:
    kind, _, form = way.partition("_")
    most = LENGTHS[device][2]
    lanes = num_cores() if kind == "local" and device == "cpu" else 1
    if form == "flat":
        return side_by_side(flatten(items), most, lanes)
    return pack(items, tokens_per_microbatch=most, lanes=lanes, apart=kind != "local")


# One way, in a process of its own


def ours(way: str, folder: Path, options: argparse.Namespace) -> Callable[[], object]:
    """What takes a step."""
    kind: Any = way.partition("_")[0]
    batches = forest_batches(way, rollouts(options.device), options.device)
    config = TrainerConfig(
        kind=kind,
        parallel=None if kind == "local" else ParallelConfig(),
        lr=LEARNING_RATE,
        activation_checkpointing=options.checkpointing,
    )
    if kind == "local":
        torch.set_num_threads(1)  # the lanes take the cores
        lanes = num_cores() if options.device == "cpu" else 1
        model = load_model(folder, dtype="bfloat16", device=options.device)
        trainer = LocalTrainer(model.module, config, AlgorithmConfig(), temperature=1.0, lanes=lanes)
        return lambda: trainer.step(batches)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    program = RankProgram()
    setup = TrainerSetup(
        folder, "bfloat16", options.device, config, AlgorithmConfig(), temperature=1.0, threads=num_cores()
    )
    program.call("make", kind, setup)
    return lambda: program.call("step", batches)


def peer(folder: Path, options: argparse.Namespace) -> list[float]:
    """Seconds of the steps of transformers' Trainer, the first included."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    rows = [
        {
            "input_ids": graph.path_ids(credit.nodes[0].node_id),
            "advantage": credit.nodes[0].total,
        }
        for graph, credit in rollouts(options.device)
    ]
    prompt, answer, most = LENGTHS[options.device]
    rows_per_pass = max(1, most // (prompt + answer))
    while len(rows) % rows_per_pass:
        rows_per_pass -= 1

    class PolicyTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *unused: Any, **options: Any) -> Any:
            """The clipped policy gradient of the sampled tokens, which all were sampled with log-probability -1."""
            ids = inputs["input_ids"]
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=answer + 1).logits[:, :-1].float()
            logprobs = torch.gather(logits.log_softmax(-1), 2, ids[:, -answer:, None])[..., 0]
            ratio = torch.exp(logprobs - logprobs.detach())
            advantage = inputs["advantage"][:, None]
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            return -torch.minimum(ratio * advantage, clipped * advantage).mean()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_begin(self, *unused: Any, **options: Any) -> None:
            self.marks.append(now())

        def on_step_end(self, *unused: Any, **options: Any) -> None:
            self.marks[-1] = now() - self.marks[-1]

    clock, steps = Clock(), options.repeats + 1
    torch.set_num_threads(num_cores())
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=rows_per_pass,
        gradient_accumulation_steps=len(rows) // rows_per_pass, learning_rate=LEARNING_RATE, bf16=True,
        use_cpu=options.device == "cpu", gradient_checkpointing=options.checkpointing, max_grad_norm=1.0,
        optim="adamw_torch_fused" if options.device == "cuda" else "adamw_torch", lr_scheduler_type="constant",
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = PolicyTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collated, callbacks=[clock])
    trainer.train()
    return clock.marks


def collated(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows])
    return {"input_ids": ids, "advantage": torch.tensor([row["advantage"] for row in rows])}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(step: Callable[[], object]) -> float:
    started = now()
    step()
    return now() - started


def measure(way: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    if options.device == "cpu":
        keep_freed_memory()
    if way == "transformers":
        times = peer(folder, options)
    else:
        step = ours(way, folder, options)
        times = [seconds(step) for _ in range(options.repeats + 1)]
    step_s = statistics.median(times[1:])
    if options.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    targets = GROUPS * ROLLOUTS * LENGTHS[options.device][1]
    return {
        "step_s": round(step_s, 4),
        "targets_per_s": round(targets / step_s, 1),
        "peak_mb": round(peak / 2**20),
        "runs": [round(each, 4) for each in times],
    }


# All ways


def model_folder(name: str, folder: Path) -> Path:
    if name not in SHAPES:
        return resolve_model(name)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(Qwen3Config(**SHAPES[name]))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["smollm2-135m", *SHAPES], default="smollm2-135m")
    parser.add_argument("--device", choices=list(LENGTHS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=list(WAYS), help="measure only these")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in the backward pass")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/backends_DEVICE_MODEL.json")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.folder, options)), flush=True)
        os._exit(0)  # backends leave threads behind
    figures: dict[str, Any] = {name: getattr(options, name) for name in ("model", "device", "checkpointing")}
    with tempfile.TemporaryDirectory(prefix="upspiral-backends-") as folder:
        found = model_folder(options.model, Path(folder))
        for way in options.only or WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--folder", str(found)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True)
            figures[way] = json.loads(done.stdout.splitlines()[-1])
            if way != "transformers" and "transformers" in figures:
                figures[way]["ratio"] = round(figures["transformers"]["step_s"] / figures[way]["step_s"], 2)
            print(way, figures[way], file=sys.stderr, flush=True)
    if options.device == "cuda":
        figures["gpu"] = torch.cuda.get_device_name()
    report(f"backends_{options.device}_{options.model}", figures, {}, save=options.save)


if __name__ == "__main__":
    main()
