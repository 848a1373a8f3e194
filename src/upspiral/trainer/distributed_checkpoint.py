"""Checkpoints by torch's distributed checkpoint: every rank writes its parts, and any division of the model reads them.

A state is a dict of DTensors and numbers. The key of its format is in it, so that another kind's state lacks it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from upspiral.errors import StoreError


def save_parts(folder: Path, state: dict[str, Any], kind: str) -> None:
    """Writes every rank's parts into an empty folder. All ranks take part. `kind`: the `trainer.kind`."""
    save({**state, _format(kind): True}, checkpoint_id=folder)


def load_parts(folder: Path, state: dict[str, Any], kind: str) -> None:
    """Reads every rank's parts: tensors in place, numbers into the dict. All ranks take part. StoreError when the
    folder holds another model or is another kind's."""
    found = {**state, _format(kind): True}
    try:
        load(found, checkpoint_id=folder)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        raise StoreError(
            f'{folder} is no checkpoint of this model by trainer.kind = "{kind}" ({error}); resume with the model and '
            "the kind of trainer that wrote it"
        ) from error
    state.update((name, found[name]) for name in state)


def _format(kind: str) -> str:
    return f"upspiral-{kind}-1"
