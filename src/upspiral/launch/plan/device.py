"""What one device can do: GPUs from their data sheets; this machine's CPU is measured."""

from __future__ import annotations

import difflib
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import psutil

from upspiral.errors import ConfigError
from upspiral.launch.plan.shape import ModelShape

_HOST_BYTES_PER_S = 18e9
"""Of one thread that copies (benchmarks/publish.py: 269 MB of weights in 0.015 s)."""


@dataclass(frozen=True, slots=True)
class Device:
    """`flops`, `bytes_per_s` and `link_bytes_per_s` are peaks; `trains`, `prefills`, `decodes`, `reads` and `links` the
    shares of them that real steps reach."""

    name: str
    memory_gb: float
    flops: float
    """Of products in the model's precision, per second."""
    bytes_per_s: float
    """From its memory."""
    link_bytes_per_s: float
    """To another device of its node, in one direction."""
    host_bytes_per_s: float = _HOST_BYTES_PER_S
    """That one thread of the host copies."""
    cores: int = 0
    """Of a machine whose processes share them; 0: every rank and engine has a device of its own."""
    module_flops: float = 0.0
    """`flops` where transformers' modules compute: on a CPU, torch's own products are slower in float32 than those that
    we ask oneDNN for (kernel/product.py). 0: the same."""
    trains: float = 0.4
    """Of `flops`: 38 to 43 % are reported for dense models on H100s (Llama 3, table 4)."""
    prefills: float = 0.5
    decodes: float = 0.3
    """Of `flops`, with many sequences."""
    reads: float = 0.6
    """Of `bytes_per_s`."""
    links: float = 1.0
    """Of `link_bytes_per_s`: on a CPU, what gloo reaches of a bare socket, its sums and copies included."""

    @property
    def is_cpu(self) -> bool:
        return self.cores > 0


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


def device(name: str, shape: ModelShape, dtype: str) -> Device:
    """One of GPUS, or "cpu", this machine, measured with products of the model's sizes in its precision. Raises
    ConfigError for others."""
    name = name.lower()
    if name == "cpu":
        return this_cpu(shape, dtype)
    if name not in GPUS:
        meant = difflib.get_close_matches(name, ["cpu", *GPUS], n=1)
        hint = f"did you mean {meant[0]}? There are" if meant else "choose one of"
        raise ConfigError(f"--device {name}: {hint} cpu, {', '.join(GPUS)}")
    return GPUS[name]


def this_cpu(shape: ModelShape, dtype: str, *, now: Callable[[], float] = time.perf_counter) -> Device:
    """Measured in about two seconds with all cores: what a product with a layer's weights computes, what one with a
    single row reads, what a copy moves and what goes through a socket, as ranks of one machine talk over them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    source = np.ones(1 << 26, np.uint8)
    target = np.empty_like(source)
    copied = _rate(lambda: np.copyto(target, source), source.nbytes, now)
    flops, module_flops, read = _product_rates(shape, dtype, now)
    memory_gb = psutil.virtual_memory().total / 2**30
    return Device("cpu", memory_gb, flops, read, _socket_rate(), copied, cores, module_flops, **_CPU_SHARES)


_ROWS, _LARGE_BYTES = 512, 64 << 20
"""Of a product that computes, and of weights that no cache holds."""
_CPU_SHARES = {"trains": 0.75, "prefills": 0.6, "decodes": 0.6, "reads": 0.45, "links": 0.4}
"""What is left of bare products with SmolLM2-135M (benchmarks/plan.py, on an AMD EPYC)."""


def _product_rates(shape: ModelShape, dtype: str, now: Callable[[], float]) -> tuple[float, float, float]:
    """Operations per second of many rows, with weights that are laid out for our engine and with those of a module, and
    bytes per second of one row. Of a mixture, as many rows as an expert gets. Without torch, numpy's in float32."""
    width = 2 if dtype == "bfloat16" else 4
    rows = _ROWS * shape.experts_per_token // shape.experts if shape.experts else _ROWS
    height = _LARGE_BYTES // (width * shape.hidden)
    try:
        import torch
    except ImportError:
        few, many = (np.ones((count, shape.hidden), np.float32) for count in (1, rows))
        weight, tall = (np.ones((shape.hidden, count), np.float32) for count in (shape.inner, height))
        ours = modules = partial(np.matmul, many, weight)
        reads = partial(np.matmul, few, tall)
    else:
        from upspiral.kernel.product import has_onednn, multiply, multiply_packed, packed

        kind = getattr(torch, dtype)
        few, many = (torch.ones(count, shape.hidden, dtype=kind) for count in (1, rows))
        weight, tall = (torch.ones(count, shape.hidden, dtype=kind) for count in (shape.inner, height))
        product: Any = multiply_packed if has_onednn(weight) else multiply
        laid_out, tall = (packed(each) if has_onednn(each) else each for each in (weight, tall))
        ours, modules = partial(product, many, laid_out), partial(torch.mm, many, weight.mT)
        reads = partial(product, few, tall)
    operations = 2 * rows * shape.hidden * shape.inner
    amounts = ((ours, operations), (modules, operations), (reads, width * height * shape.hidden))
    flops, module_flops, read = (_rate(work, amount, now, seconds=0.3) for work, amount in amounts)
    return flops, module_flops, read


_SOCKET_DEADLINE_S = 60.0


def _socket_rate(size: int = 1 << 26) -> float:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        server.settimeout(_SOCKET_DEADLINE_S)
        receiver, _ = server.accept()
        receiver.settimeout(_SOCKET_DEADLINE_S)
        with receiver:
            room = memoryview(bytearray(1 << 20))
            sending = threading.Thread(target=sender.sendall, args=(bytes(size),), daemon=True)
            started, left = time.perf_counter(), size
            sending.start()
            while left:
                came = receiver.recv_into(room, min(left, len(room)))
                assert came, "the sender sends all of it"
                left -= came
            return size / (time.perf_counter() - started)


def _rate(work: Callable[[], object], amount: float, now: Callable[[], float], *, seconds: float = 0.1) -> float:
    """The median after a warm-up, of as many as take `seconds`, but nine at least."""
    work()
    taken: list[float] = []
    while len(taken) < 9 or sum(taken) < seconds:
        started = now()
        work()
        taken.append(now() - started)
    return amount / statistics.median(taken)
