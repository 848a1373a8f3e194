"""Seconds of the parts of a step."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from upspiral.config.combinations import publishes
from upspiral.config.models import ParallelConfig, RunConfig
from upspiral.launch.plan.device import Device
from upspiral.launch.plan.load import StepLoad
from upspiral.launch.plan.shape import ModelShape


def step_seconds(
    shape: ModelShape, config: RunConfig, load: StepLoad, device: Device, *, engines: int, running: int
) -> Mapping[str, float]:
    """Of a synchronous step: its parts come one after the other. What tools and sandboxes take comes on top.

    `engines`: devices that sample, each with a whole model. `running`: sequences that one of them decodes at the same
    time."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    ranks = config.trainer.parallel.ranks if config.trainer.parallel else 1
    own_devices = 1 if device.is_cpu else ranks
    return {
        "prefill": _prefill(shape, load, device, 1 if device.is_cpu else engines),
        "decode": _decode(shape, load, device, running, width) / (1 if device.is_cpu else engines),
        "train": _train(shape, config, load, device) / own_devices,
        "communicate": _communicate(shape, config, load, device, width),
        "optimize": _optimize(shape, config, device, width) / own_devices,
        "publish": _publish(shape, config, device, width),
    }


def _prefill(shape: ModelShape, load: StepLoad, device: Device, engines: int) -> float:
    flops = shape.forward_flops(load.prefilled, load.prefilled_context, load.rollouts * load.turns)
    return flops / (device.flops * device.prefills * engines)


def _decode(shape: ModelShape, load: StepLoad, device: Device, running: int, width: int) -> float:
    """A step of decoding reads all weights once and computes. A GPU does both at the same time, a CPU one after the
    other; every running sequence's keys and values are read then."""
    cached = running * load.decoded_context * shape.kv_bytes(width)
    reads = device.bytes_per_s * device.reads
    read = _weights_read(shape, running) * width / reads
    computed = shape.forward_flops(running, load.decoded_context, running) / (device.flops * device.decodes)
    seconds = (read + computed if device.is_cpu else max(read, computed)) + cached / reads
    return seconds * load.sampled / running


def _weights_read(shape: ModelShape, running: int) -> float:
    """Of layers with experts, those that at least one of the running tokens is expected to choose."""
    head = shape.vocabulary * shape.hidden
    if not shape.experts:
        return shape.weights_per_token + head
    chosen = shape.experts * (1 - (1 - shape.experts_per_token / shape.experts) ** running)
    block = 3 * shape.hidden * shape.inner
    return shape.weights_per_token + shape.layers * (chosen - shape.experts_per_token) * block + head


def _train(shape: ModelShape, config: RunConfig, load: StepLoad, device: Device) -> float:
    """Of one device. With several minibatches, log-probabilities are computed before the first update."""
    again = config.trainer.activation_checkpointing
    flops = shape.training_flops(load.unique, load.trained_context, load.sampled, checkpointing=again)
    if config.trainer.minibatches > 1:
        flops += shape.forward_flops(load.unique, load.trained_context, load.sampled)
    by_modules = shape.experts or config.trainer.kind != "local"
    return flops / ((device.module_flops if by_modules and device.module_flops else device.flops) * device.trains)


def _communicate(shape: ModelShape, config: RunConfig, load: StepLoad, device: Device, width: int) -> float:
    """Rings move (n - 1) / n of what they gather or add; tensor parallel layers add four times a layer and token
    (Shoeybi et al. 2019, section 3). The ranks of a CPU share its cores, which do the moving."""
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
    return moved * (parallel.ranks if device.is_cpu else 1) / (device.link_bytes_per_s * device.links)


def _optimize(shape: ModelShape, config: RunConfig, device: Device, width: int) -> float:
    """Bytes of a weight, of one device. AdamW reads weight, gradient and both moments and writes all but the gradient
    (28); the gradient's norm is read (4) and it is scaled (8); a rounded weight is written from its master (6)."""
    count = 40 + (6 if width == 2 else 0)
    rate = device.bytes_per_s * (1 if device.is_cpu else device.reads)
    return config.trainer.minibatches * count * shape.parameters / rate


def _publish(shape: ModelShape, config: RunConfig, device: Device, width: int) -> float:
    """Passes of one thread over the weights, through memory: summed up and written, summed up again where they are
    read, and copied to where they are used. A difference costs as much as 12 passes (benchmarks/publish.py: 0.19 s of
    269 MB). A disk or a network between takes what it takes, on top."""
    if not publishes(config):
        return 0.0
    passes = 4 if config.weights.form == "full" else 12
    return passes * width * shape.parameters / device.host_bytes_per_s
