"""Bytes of every process, by what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from upspiral.config.combinations import publishes
from upspiral.config.models import ParallelConfig, RunConfig, ServerConfig
from upspiral.launch.plan.device import Device
from upspiral.launch.plan.load import StepLoad
from upspiral.launch.plan.shape import ModelShape
from upspiral.loop.devices import devices_of_model

_LOGITS_BLOCK = {True: 4 << 23, False: 4 << 25}
"""On a CPU and elsewhere; see trainer/logprob.py."""
_MOMENTS = 8
"""AdamW's two, in float32, of a weight."""
_INTERPRETER = 0.45 * 2**30
"""Python, torch and transformers on a CPU: 0.34 GB when they are imported, 0.45 when they have computed."""
_WHILE_TRAINING = ("logits", "activations", "gathered")
"""What of a trainer is there in its steps only; gradients, too, except with DeepSpeed, which keeps room for them."""


def trainer_bytes(shape: ModelShape, config: RunConfig, load: StepLoad, device: Device) -> Mapping[str, float]:
    """Of one rank. Weights, gradients and optimizer states after Rajbhandari et al. 2020 (ZeRO, section 3), in the
    precisions that our backends keep them in."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    parallel = config.trainer.parallel or ParallelConfig()
    count, tensor = shape.parameters, parallel.tensor
    whole = shape.outer_parameters + shape.layer_parameters
    lanes = max(1, config.model.threads or device.cores) if config.trainer.kind == "local" else 1
    data = lanes if config.trainer.kind == "local" else parallel.ranks // tensor
    tokens = min(config.trainer.tokens_per_microbatch, ceil(load.unique / data))
    found = {
        "logits": _LOGITS_BLOCK[device.is_cpu] * 3.0 * lanes,
        "activations": lanes * tokens * _kept_bytes(shape, config, width) / tensor,
    }
    match config.trainer.kind:
        case "local":
            adapter = config.trainer.lora
            trained = count if adapter is None else _factors(shape, adapter.rank)
            base = count * width if adapter is not None else 0
            master = 4 * trained if width == 2 and config.trainer.master_weights == "float32" else 0
            found |= {"weights": count * width + base, "masters": master, "moments": _MOMENTS * trained}
            # The sums, and in each lane that of a tied embedding, which is complete when the pass is.
            waiting = lanes * width * shape.outer_parameters if shape.tied and adapter is None else 0
            found["gradients"] = 4.0 * trained + waiting
        case "fsdp":
            shards = parallel.ranks
            found |= {"weights": 4 * count / shards, "moments": _MOMENTS * count / shards}
            found["gradients"] = 4 * count / shards
            # Weights as they arrive and as they are used; of the outer ones a gradient for each of their two uses, and
            # what is added up in float32, before and after.
            found["gathered"] = (width * 2 * whole + (2 * width + 8) * shape.outer_parameters) / tensor
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
    return found | _host_bytes(shape, config, device)


def resting_bytes(trainer: Mapping[str, float], kind: str) -> float:
    """What is left of `trainer_bytes` between two steps. `kind`: of the trainer."""
    passing = _WHILE_TRAINING if kind == "deepspeed" else (*_WHILE_TRAINING, "gradients")
    return sum(amount for part, amount in trainer.items() if part not in passing)


def _host_bytes(shape: ModelShape, config: RunConfig, device: Device) -> dict[str, float]:
    """What a process has in a CPU's memory, whatever it computes; "base": the version that a difference is to."""
    if not device.is_cpu:
        return {}
    width = 2 if config.model.dtype == "bfloat16" else 4
    base = {"base": float(width * shape.parameters)} if publishes(config) and config.weights.form == "delta" else {}
    return {"interpreter": _INTERPRETER, **base}


def engine_bytes(shape: ModelShape, config: RunConfig, device: Device) -> Mapping[str, float]:
    """Of one device of an engine that does not share the trainer's weights; "cache" is what it would have to have for
    `engine.max_running` whole contexts."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    if config.engine.kind == "embedded":
        cached = config.engine.cache_slots * config.engine.context_length * shape.kv_bytes(width)
        # On a CPU, products read weights that were packed for them.
        packed = float(shape.parameters * width) if device.is_cpu else 0.0
        found = {"weights": float(shape.parameters * width), "packed": packed, "cache": float(cached)}
    else:
        divided = engine_devices(config)
        cached = config.engine.max_running * config.engine.context_length * shape.kv_bytes(width) / divided
        if device.is_cpu:  # a server takes what it is told to
            cached = (config.engine.server or ServerConfig()).cache_gb * 2**30
        found = {"weights": shape.parameters * width / divided, "cache": float(cached)}
    return found | _host_bytes(shape, config, device)


def engine_devices(config: RunConfig) -> int:
    """Among how many an engine is divided."""
    return devices_of_model((config.engine.server or ServerConfig()).arguments)


def _kept_bytes(shape: ModelShape, config: RunConfig, width: int) -> float:
    """Of a token, between its forward and its backward pass. Ranks compute by transformers' modules, whose two norms
    keep a float32 copy of what comes in and of what goes out."""
    layer = shape.activation_bytes(width)
    if config.trainer.kind != "local":
        layer += 2 * shape.hidden * (8 if width == 2 else 4)
    if config.trainer.activation_checkpointing:
        return shape.layers * shape.hidden * width + layer
    return shape.layers * layer


def _factors(shape: ModelShape, rank: int) -> int:
    """Weights of the factors beside every linear layer of a dense model."""
    projected = shape.head_width * (2 * shape.heads + 2 * shape.key_heads) + 4 * shape.hidden
    return shape.layers * rank * (projected + 3 * (shape.hidden + shape.inner))
