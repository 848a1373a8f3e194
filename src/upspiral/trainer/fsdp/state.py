"""What is in a checkpoint of FSDP2: weights and moments by the model's own names, and counters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from upspiral.trainer.distributed_checkpoint import load_parts, save_parts
from upspiral.trainer.fsdp.optimizer import ShardedAdamW

_KIND = "fsdp"


def save_state(folder: Path, parameters: Mapping[str, DTensor], optimizer: ShardedAdamW, policy_steps: int) -> None:
    """Weights, moments and counters into an empty folder. All ranks take part."""
    save_parts(folder, _state(parameters, optimizer, policy_steps), _KIND)


def load_state(folder: Path, parameters: Mapping[str, DTensor], optimizer: ShardedAdamW) -> int:
    """Restores weights and moments in place; returns the number of policy steps. StoreError when the folder holds
    another model or is another backend's."""
    state = _state(parameters, optimizer, 0)
    load_parts(folder, state, _KIND)
    optimizer.steps = int(state["optimizer_steps"])
    return int(state["policy_steps"])


def _state(parameters: Mapping[str, DTensor], optimizer: ShardedAdamW, policy_steps: int) -> dict[str, Any]:
    state: dict[str, Any] = {"policy_steps": policy_steps, "optimizer_steps": optimizer.steps}
    moments = zip(parameters.items(), optimizer.first, optimizer.second, strict=True)
    for (name, parameter), first, second in moments:
        state[f"weight.{name}"] = parameter.detach()
        state[f"first.{name}"], state[f"second.{name}"] = _like(parameter, first), _like(parameter, second)
    return state


def _like(parameter: DTensor, part: Tensor) -> DTensor:
    """The tensor whose part on this rank this is, where it is divided as the parameter."""
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
