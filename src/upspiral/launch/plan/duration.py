"""Seconds of the parts of a step."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from upspiral.config.models import ParallelConfig, RunConfig
from upspiral.launch.plan.device import Device
from upspiral.launch.plan.load import StepLoad
from upspiral.launch.plan.shape import ModelShape


def step_seconds(
    shape: ModelShape, config: RunConfig, load: StepLoad, device: Device, *, engines: int
) -> Mapping[str, float]:
    """Of a synchronous step: its parts come one after the other. What tools and sandboxes take comes on top."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    return {
        "prefill": _prefill(shape, load, device, engines),
        "decode": _decode(shape, config, load, device, engines, width),
        "train": _train(shape, config, load, device),
        "communicate": _communicate(shape, config, load, device, width),
        "optimize": _optimize(shape, config, device),
        "publish": _publish(shape, config, device, width),
    }


def _prefill(shape: ModelShape, load: StepLoad, device: Device, engines: int) -> float:
    flops = shape.forward_flops(load.prefilled, load.length / 2, load.rollouts * load.turns)
    return flops / (device.flops * device.prefills * engines)


def _decode(shape: ModelShape, config: RunConfig, load: StepLoad, device: Device, engines: int, width: int) -> float:
    """A step of decoding reads all weights once and every running sequence's keys and values, or computes, whichever
    takes longer."""
    running = min(config.engine.max_running, config.agent.concurrency, ceil(load.rollouts / engines))
    read = _weights_read(shape, running) * width + running * load.length / 2 * shape.kv_bytes(width)
    flops = shape.forward_flops(running, load.length / 2, running)
    seconds = max(read / (device.bytes_per_s * device.reads), flops / (device.flops * device.decodes))
    return seconds * load.sampled / (running * engines)


def _weights_read(shape: ModelShape, running: int) -> float:
    """Of layers with experts, those that at least one of the running tokens is expected to choose."""
    head = shape.vocabulary * shape.hidden
    if not shape.experts:
        return shape.weights_per_token + head
    chosen = shape.experts * (1 - (1 - shape.experts_per_token / shape.experts) ** running)
    block = 3 * shape.hidden * shape.inner
    return shape.weights_per_token + shape.layers * (chosen - shape.experts_per_token) * block + head


def _train(shape: ModelShape, config: RunConfig, load: StepLoad, device: Device) -> float:
    """The backward pass costs two forward passes (Kaplan et al. 2020); checkpointing one more."""
    passes = 4 if config.trainer.activation_checkpointing else 3
    ranks = config.trainer.parallel.ranks if config.trainer.parallel else 1
    flops = passes * shape.forward_flops(load.unique, load.length / 2, load.sampled)
    return flops / (device.flops * device.trains * ranks)


def _communicate(shape: ModelShape, config: RunConfig, load: StepLoad, device: Device, width: int) -> float:
    """Rings move (n - 1) / n of what they gather or add; tensor parallel layers add four times a layer and token
    (Shoeybi et al. 2019, section 3)."""
    parallel = config.trainer.parallel or ParallelConfig()
    if parallel.ranks == 1:
        return 0.0
    data = parallel.ranks // parallel.tensor
    rounds = ceil(load.unique / (config.trainer.tokens_per_microbatch * data))
    share, count = (data - 1) / data, shape.parameters / parallel.tensor
    gathers = config.trainer.kind == "fsdp" or (config.trainer.kind == "deepspeed" and parallel.zero_stage == 3)
    moved = share * count * ((2 * width + 4) * rounds if gathers else 4 + width)
    added = 2 * (parallel.tensor - 1) / parallel.tensor
    moved += added * 4 * shape.layers * load.unique / data * shape.hidden * width
    return moved / device.link_bytes_per_s


def _optimize(shape: ModelShape, config: RunConfig, device: Device) -> float:
    """Weights, gradients and both moments are read, all but gradients written: 28 bytes a weight."""
    ranks = config.trainer.parallel.ranks if config.trainer.parallel else 1
    return config.trainer.minibatches * 28 * shape.parameters / ranks / (device.bytes_per_s * device.reads)


def _publish(shape: ModelShape, config: RunConfig, device: Device, width: int) -> float:
    """Written and read once."""
    if config.engine.kind == "embedded" and config.trainer.kind == "local" and config.cluster.address is None:
        return 0.0
    return 2 * width * shape.parameters / min(device.link_bytes_per_s, 10e9)
