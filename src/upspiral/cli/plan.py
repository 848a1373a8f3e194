"""`upspiral plan`: what a run will take, before it is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from upspiral.config.loader import load_run_config

if TYPE_CHECKING:
    from upspiral.launch.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What rollouts will be like. Without, they are as long as the run file's limits allow."""

    turns: Annotated[int | None, Parameter(help="Answers of the model in a rollout.")] = None
    prompt_tokens: Annotated[int | None, Parameter(help="Tokens before the first answer.")] = None
    answer_tokens: Annotated[int | None, Parameter(help="Tokens of one answer.")] = None


def plan(
    file: Path,
    /,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True)],
    device: str = "cpu",
    rollouts: Annotated[Rollouts, Parameter(name="*")] = Rollouts(),
) -> None:
    """Say what memory every process of a run will need and how long a step will take, or why it cannot fit.

    Estimates by formulas whose sources stand in the code (launch/plan/); tools, sandboxes and verifiers not included.

    Parameters
    ----------
    file
        The run file (TOML). Its model's config.json is read, no weights.
    overrides
        Keys of the run file as flags: --trainer.parallel.ranks 8. They win over the file.
    device
        What each rank and engine has: a100, h100, h200, b200, l40s, or cpu: they share this machine, which is measured.
    """
    from upspiral.cli.run import parse_flags
    from upspiral.launch.plan.device import device as device_of
    from upspiral.launch.plan.load import StepLoad
    from upspiral.launch.plan.plan import Plan
    from upspiral.launch.plan.shape import ModelShape
    from upspiral.weights.models import resolve_model

    config = load_run_config(file, parse_flags(overrides))
    shape = ModelShape.of_folder(resolve_model(config.model.path, tokenizer=False, weights=False))
    load = StepLoad.of(config, turns=rollouts.turns, prompt=rollouts.prompt_tokens, answer=rollouts.answer_tokens)
    made = Plan.of(shape, config, load, device_of(device, shape, config.model.dtype))
    show(made)
    made.check()


def show(plan: Plan) -> None:
    """Prints it."""
    from upspiral.launch.plan.memory import engine_devices
    from upspiral.launch.plan.plan import better_split, describe_split

    shape, load, device = plan.shape, plan.load, plan.device
    active = shape.weights_per_token + shape.vocabulary * shape.hidden
    print(f"model      {shape.parameters / 1e9:.3f} B weights, {active / 1e9:.3f} B of them for a token")
    print(
        f"device     {device.name}: {device.memory_gb:.0f} GB, {device.flops / 1e12:.1f} TFLOP/s, "
        f"{device.bytes_per_s / 1e9:.0f} GB/s"
    )
    print(
        f"step       {load.rollouts} rollouts of {load.turns} answers, {load.length} tokens long; {load.sampled:,} "
        f"tokens sampled, {load.unique:,} trained on (one row each would be {load.flat:,})"
    )
    _table(f"memory of {_count(plan.ranks, 'rank')}, each", plan.trainer, 2**30, "GB")
    if plan.engine:
        size = f" on {devices} devices" if (devices := engine_devices(plan.config)) > 1 else ""
        shares = ", beside what it shares with the rank" if plan.shared else ""
        _table(f"memory of {_count(plan.engines, 'engine')}, each{size}{shares}", plan.engine, 2**30, "GB")
    else:
        print(
            f"{_count(plan.engines, 'engine')} of engine.server.urls: their memory is not counted, each is taken for "
            f"one {device.name}"
        )
    print(f"    {plan.running} sequences decode at the same time")
    for who, needed in plan.needed.items():
        print(f"{who}: {needed / 2**30:.2f} GB of {plan.usable / 2**30:.1f} that can be used")
    _table("seconds of a step", plan.seconds, 1.0, "s")
    print(f"bottleneck {plan.bottleneck}: {100 * plan.seconds[plan.bottleneck] / plan.total_s:.0f} % of the step")
    better = better_split(plan) if plan.fits else None
    if better is not None:
        print(f"better     {describe_split(better)}: {better.total_s:.1f} s a step")


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _table(title: str, parts: Mapping[str, float], unit: float, name: str) -> None:
    print(f"{title}: {sum(parts.values()) / unit:.2f} {name}")
    for part, amount in parts.items():
        if amount:
            print(f"    {part:<12} {amount / unit:10.2f} {name}")
