"""What the pool and the server add to a backend of sandboxes.

    python benchmarks/sandbox_server.py [--backend process] [--save]

The same is done with the backend itself, through a pool in this process, and through a server in a process of its own
on loopback: making a sandbox, taking a warm one, a command (`true`) after the other, and commands of 16 sandboxes at
a time. Times in ms, from asking to the answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import numpy as np

from result import report
from upspiral.sandbox.base import Sandbox, SandboxBackend, SandboxSpec
from upspiral.sandbox.pool import Pool, PoolLimits
from upspiral.sandbox.registry import BACKENDS, make_backend
from upspiral.sandbox.remote import RemoteBackend

SPEC = SandboxSpec()
SAMPLES = 200
SIDE_BY_SIDE = 16
TIMEOUT_S = 60.0
TARGETS = {"pool.warm_acquire_ms.p50": 1.0, "server.exec_ms.p50": 5.0}


async def timed(what: Callable[[], Awaitable[Any]], count: int = SAMPLES) -> dict[str, float]:
    taken_ms: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await what()
        taken_ms.append((time.perf_counter() - began) * 1000)
    return {f"p{q}": round(float(np.percentile(taken_ms, q)), 3) for q in (50, 99)}


async def measure(backend: SandboxBackend) -> dict[str, Any]:
    async def make() -> None:
        async with backend.acquire(SPEC):
            pass

    async with AsyncExitStack() as stack:
        sandboxes = [await stack.enter_async_context(backend.acquire(SPEC)) for _ in range(SIDE_BY_SIDE)]
        await asyncio.gather(*(sandbox.exec("true", timeout_s=TIMEOUT_S) for sandbox in sandboxes))
        one = sandboxes[0]
        exec_ms = await timed(lambda: one.exec("true", timeout_s=TIMEOUT_S))
        began = time.perf_counter()
        await asyncio.gather(*(many(sandbox) for sandbox in sandboxes))
        execs_per_s = SIDE_BY_SIDE * SAMPLES / 4 / (time.perf_counter() - began)
    return {"make_and_stop_ms": await timed(make, 50), "exec_ms": exec_ms, "execs_per_s": round(execs_per_s)}


async def many(sandbox: Sandbox) -> None:
    for _ in range(SAMPLES // 4):
        await sandbox.exec("true", timeout_s=TIMEOUT_S)


async def warm_acquire(backend: SandboxBackend) -> dict[str, float]:
    pool = Pool(backend, PoolLimits())
    pool.keep_warm(SPEC, minimum=8)
    taken_ms: list[float] = []
    for _ in range(SAMPLES // 2):
        while pool.stats.warm < 4:
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        async with pool.acquire(SPEC):
            taken_ms.append((time.perf_counter() - began) * 1000)
    await pool.stop()
    return {f"p{q}": round(float(np.percentile(taken_ms, q)), 3) for q in (50, 99)}


@contextmanager
def server(backend: str) -> Iterator[tuple[str, str]]:
    token = secrets.token_hex(16)
    process = subprocess.Popen(
        [sys.executable, "-m", "upspiral", "sandbox", "serve", "--backend", backend, "--port", "0", "--warm", "0"],
        stdout=subprocess.PIPE,
        env={**os.environ, "UPSPIRAL_SANDBOX_TOKEN": token},
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"], token
    finally:
        process.terminate()
        process.wait(timeout=60)


async def run(name: str) -> dict[str, Any]:
    backend = make_backend(name)
    figures: dict[str, Any] = {"backend": name, "direct": await measure(backend)}
    figures["pool"] = {"warm_acquire_ms": await warm_acquire(backend)}
    with server(name) as (url, token):
        remote = RemoteBackend(url, token)
        figures["server"] = await measure(remote)
        await remote.stop()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="namespace", choices=list(BACKENDS))
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    figures = asyncio.run(run(arguments.backend))
    report("sandbox_server", figures, TARGETS, save=arguments.save)


if __name__ == "__main__":
    main()
