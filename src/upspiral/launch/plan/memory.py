"""Bytes of every process, by what they are for."""

from __future__ import annotations

from collections.abc import Mapping

from upspiral.config.models import ParallelConfig, RunConfig
from upspiral.launch.plan.shape import ModelShape

_LOGITS_BLOCK = {"cpu": 4 << 23, "cuda": 4 << 25}
"""See trainer/logprob.py."""
_MOMENTS = 8
"""AdamW's two, in float32, of a weight."""


def trainer_bytes(shape: ModelShape, config: RunConfig, device: str) -> Mapping[str, float]:
    """Of one rank. Weights, gradients and optimizer states after Rajbhandari et al. 2020 (ZeRO, section 3), in the
    precisions that our backends keep them in."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    parallel = config.trainer.parallel or ParallelConfig()
    count, tensor = shape.parameters, parallel.tensor
    whole = shape.outer_parameters + shape.layer_parameters
    found = {"logits": _LOGITS_BLOCK[device] * 2.0, "activations": _activations(shape, config, width) / tensor}
    match config.trainer.kind:
        case "local":
            adapter = config.trainer.lora
            trained = count if adapter is None else _factors(shape, adapter.rank)
            base = count * width if adapter is not None else 0
            master = 4 * trained if width == 2 and config.trainer.master_weights == "float32" else 0
            lanes = 1 if device == "cuda" else max(1, config.model.threads)
            found["activations"] *= lanes
            found |= {"weights": count * width + base, "masters": master, "moments": _MOMENTS * trained}
            found["gradients"] = 4.0 * trained
        case "fsdp":
            shards = parallel.ranks
            found |= {"weights": 4 * count / shards, "moments": _MOMENTS * count / shards}
            found["gradients"] = 4 * count / shards
            found["gathered"] = width * 2 * whole / tensor
        case "deepspeed":
            stage, ranks = parallel.zero_stage, parallel.ranks
            found["weights"] = width * count / (ranks if stage == 3 else 1)
            found["masters"] = (4 if width == 2 else 0) * count / ranks
            found["moments"] = _MOMENTS * count / ranks
            found["gradients"] = 4 * count / (ranks if stage >= 2 else 1)
            found["gathered"] = width * 2 * whole if stage == 3 else 0.0
        case _:
            found |= {"weights": width * count / tensor, "gradients": 4 * count / tensor}
            found |= {"masters": (4 if width == 2 else 0) * count / tensor, "moments": _MOMENTS * count / tensor}
    return found


def engine_bytes(shape: ModelShape, config: RunConfig) -> Mapping[str, float]:
    """Of one engine that does not share the trainer's weights."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    slots = config.engine.cache_slots if config.engine.kind == "embedded" else config.engine.max_running
    cached = slots * config.engine.context_length * shape.kv_bytes(width)
    # On a CPU, products read weights that were packed for them; servers pack in place.
    packed = shape.parameters * width if config.engine.kind == "embedded" else 0
    return {"weights": float(shape.parameters * width), "packed": float(packed), "cache": float(cached)}


def _activations(shape: ModelShape, config: RunConfig, width: int) -> float:
    tokens = config.trainer.tokens_per_microbatch
    if config.trainer.activation_checkpointing:
        kept = shape.layers * shape.hidden * width + shape.activation_bytes(width)
    else:
        kept = shape.layers * shape.activation_bytes(width)
    return float(tokens * kept)


def _factors(shape: ModelShape, rank: int) -> int:
    """Weights of the factors beside every linear layer of a dense model."""
    projected = shape.head_width * (2 * shape.heads + 2 * shape.key_heads) + 4 * shape.hidden
    return shape.layers * rank * (projected + 3 * (shape.hidden + shape.inner))
