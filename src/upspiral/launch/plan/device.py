"""What one device can do, from data sheets or measured here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil

from upspiral.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """`flops` and `bytes_per_s` are peaks; the last four are the shares of them that real steps reach."""

    name: str
    memory_gb: float
    flops: float
    """Of products in the model's precision, per second."""
    bytes_per_s: float
    """From its memory."""
    link_bytes_per_s: float
    """To another device of its node, in one direction."""
    trains: float = 0.4
    """Of `flops`: 38 to 43 % are reported for dense models on H100s (Llama 3, table 4)."""
    prefills: float = 0.5
    decodes: float = 0.3
    """Of `flops`, with many sequences."""
    reads: float = 0.6
    """Of `bytes_per_s`."""


def _gpu(name: str, memory_gb: float, tera_flops: float, tera_bytes: float, link_gb: float) -> Device:
    return Device(name, memory_gb, tera_flops * 1e12, tera_bytes * 1e12, link_gb * 1e9)


GPUS = {
    each.name: each
    for each in (
        _gpu("a100", 80, 312, 2.04, 300),
        _gpu("h100", 80, 989, 3.35, 450),
        _gpu("h200", 141, 989, 4.8, 450),
        _gpu("b200", 180, 2250, 8.0, 900),
        _gpu("l40s", 48, 362, 0.864, 32),
    )
}
"""NVIDIA's data sheets of the SXM forms (L40S: PCIe): dense bfloat16, without sparsity; links in one direction."""


def device(name: str) -> Device:
    """One of GPUS, or "cpu", this machine. Raises ConfigError for others."""
    if name == "cpu":
        return this_cpu()
    if name not in GPUS:
        raise ConfigError(f"--device {name}: choose one of cpu, {', '.join(GPUS)}")
    return GPUS[name]


def this_cpu() -> Device:
    """Measured in about a second: a product of matrices in bfloat16 (in float32 without torch), and a copy."""
    memory = psutil.virtual_memory().total / 2**30
    source = np.ones(1 << 26, np.uint8)
    target = np.empty_like(source)
    copied = _rate(lambda: np.copyto(target, source), 2 * source.nbytes)
    # Shares by hand, from benchmarks/results/engine.json and docs/design/006: an AMD EPYC of two cores.
    return Device("cpu", memory, _product_rate(), copied, copied, trains=0.7, prefills=0.85, decodes=0.4)


def _product_rate(size: int = 1024) -> float:
    try:
        import torch
    except ImportError:
        matrix = np.ones((size, size), np.float32)
        return _rate(lambda: matrix @ matrix, 2 * size**3)
    left = torch.ones(size, size, dtype=torch.bfloat16)
    return _rate(lambda: torch.mm(left, left), 2 * size**3)


def _rate(work: Callable[[], object], amount: float, repeats: int = 9) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return amount / statistics.median(seconds[1:])
