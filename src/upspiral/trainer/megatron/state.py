"""Checkpoints by torch's distributed checkpoint, in Hugging Face's names: any number of ranks reads them.

Parts are written as parts of whole tensors, so tensor-parallel ranks find theirs again however many they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from upspiral.errors import StoreError
from upspiral.trainer.megatron.names import Names, Part
from upspiral.trainer.megatron.optimizer import DividedAdamW

_FORMAT = "upspiral-megatron-1"


def save_state(folder: Path, names: Names, optimizer: DividedAdamW, mesh: DeviceMesh, policy_steps: int) -> None:
    """Masters, moments and counters into an empty folder. All ranks take part; `mesh`: the tensor-parallel ones."""
    save(_state(names, optimizer, mesh, policy_steps), checkpoint_id=folder)


def load_state(folder: Path, names: Names, optimizer: DividedAdamW, mesh: DeviceMesh) -> int:
    """Restores weights and moments in place; returns the number of policy steps. StoreError when the folder holds
    another model or is another backend's."""
    state = _state(names, optimizer, mesh, 0)
    try:
        load(state, checkpoint_id=folder)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        raise StoreError(
            f'{folder} is no checkpoint of this model by trainer.kind = "megatron" ({error}); resume with the model '
            "and the kind of trainer that wrote it"
        ) from error
    optimizer.adamw.steps = int(state["optimizer_steps"])
    optimizer.spread()
    return int(state["policy_steps"])


def _state(names: Names, optimizer: DividedAdamW, mesh: DeviceMesh, policy_steps: int) -> dict[str, Any]:
    adamw = optimizer.adamw
    state: dict[str, Any] = {_FORMAT: True, "policy_steps": policy_steps, "optimizer_steps": adamw.steps}
    kinds = {"weight": optimizer.masters, "first": adamw.first, "second": adamw.second}
    for kind, tensors in kinds.items():
        for name, tensor in zip(optimizer.names, tensors, strict=True):
            for part in names.parts(name, tensor):
                state[f"{kind}.{part.name}"] = _of_mesh(part, mesh)
    return state


def _of_mesh(part: Part, mesh: DeviceMesh) -> Tensor:
    place = Replicate() if part.dimension is None else Shard(part.dimension)
    return DTensor.from_local(part.tensor, mesh, [place], run_check=False)
