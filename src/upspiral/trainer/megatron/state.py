"""What is in a checkpoint of Megatron: masters and moments by Hugging Face's names, and counters.

Parts are written as parts of whole tensors, so tensor-parallel ranks find theirs again however many they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from upspiral.trainer.distributed_checkpoint import load_parts, save_parts
from upspiral.trainer.megatron.names import Names, Part
from upspiral.trainer.megatron.optimizer import DividedAdamW

_KIND = "megatron"


def save_state(folder: Path, names: Names, optimizer: DividedAdamW, mesh: DeviceMesh, policy_steps: int) -> None:
    """Masters, moments and counters into an empty folder. All ranks take part; `mesh`: the tensor-parallel ones."""
    save_parts(folder, _state(names, optimizer, mesh, policy_steps), _KIND)


def load_state(folder: Path, names: Names, optimizer: DividedAdamW, mesh: DeviceMesh) -> int:
    """Restores weights and moments in place; returns the number of policy steps. StoreError when the folder holds
    another model or is another backend's."""
    state = _state(names, optimizer, mesh, 0)
    load_parts(folder, state, _KIND)
    optimizer.adamw.steps = int(state["optimizer_steps"])
    optimizer.spread()
    return int(state["policy_steps"])


def _state(names: Names, optimizer: DividedAdamW, mesh: DeviceMesh, policy_steps: int) -> dict[str, Any]:
    adamw = optimizer.adamw
    state: dict[str, Any] = {"policy_steps": policy_steps, "optimizer_steps": adamw.steps}
    kinds = {"weight": optimizer.masters, "first": adamw.first, "second": adamw.second}
    for kind, tensors in kinds.items():
        for name, tensor in zip(optimizer.names, tensors, strict=True):
            for part in names.parts(name, tensor):
                state[f"{kind}.{part.name}"] = _of_mesh(part, mesh)
    return state


def _of_mesh(part: Part, mesh: DeviceMesh) -> Tensor:
    place = Replicate() if part.dimension is None else Shard(part.dimension)
    return DTensor.from_local(part.tensor, mesh, [place], run_check=False)
