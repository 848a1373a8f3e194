"""Which GPUs an actor sees."""

from __future__ import annotations


def hidden_without(gpus: float) -> dict[str, str]:
    """What has to be in the environment of an actor that asked Ray for so many, before torch looks for devices. One
    that asked for none sees all of its node's otherwise, and "auto" would be the first of them for all such actors."""
    return {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
