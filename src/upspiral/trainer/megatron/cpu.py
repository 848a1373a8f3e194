"""Megatron-core on a CPU, FOR TESTS OF LOGIC ONLY: it is made for CUDA, and nothing here makes it fast.

Megatron's layers ask for the current CUDA device where they mean "where the model is". On a machine without CUDA that
question gets an answer here. Whatever else of torch.cuda is called still raises, so nothing passes silently.
"""

from __future__ import annotations

import torch

from upspiral.errors import ConfigError


def pretend_that_cpu_is_a_device() -> None:
    """For the rest of the process. Raises ConfigError where there is CUDA: then Megatron shall have it."""
    if torch.cuda.is_available():
        raise ConfigError(
            'model.device = "cpu" with trainer.kind = "megatron" is for tests on machines without CUDA, and this one '
            'has it; set model.device = "cuda", or another trainer.kind'
        )
    torch.cuda.current_device = _current_device


def _current_device() -> torch.device:
    return torch.device("cpu")
