"""How fast namespace sandboxes are made, act, fork and end, how many live at once, and what one weighs.

    python benchmarks/sandbox_namespace.py [--live 2000] [--save]

- `create_ms`: from asking to ready, one at a time; `create_8_ms` and `creates_per_s` with eight in flight.
- `exec_ms`: `true`, to its result, one at a time; `execs_per_s`: in 64 sandboxes at once; `plain_ms`: the same as a
  bare subprocess of this program, for comparison.
- `seal_ms`, `copy_ms`: a snapshot of 100 MB in 2,000 files, at rest and while something runs; `fork_ms`: from asking
  for one fork of that to its first command's end, at rest; `forks_64_s`: the same for 64 forks; `restore_ms`;
  `diff_ms`: of all of it.
- `live`: so many at once; `live_mb`: what memory the machine has less for each; `teardown_1000_s`.

Times in milliseconds as {p50, p99} unless the name says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from result import report
from upspiral.sandbox.base import Limits, SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.sandbox.namespace.sandbox import NamespaceSandbox

TIMEOUT_S = 60.0
SAMPLES = 200
ROOMY = SandboxSpec(limits=Limits(memory_mb=1024, disk_mb=512, inodes=100_000))
WORKSPACE_100_MB = "for i in {1..20}; do mkdir $i; head -c 5120000 /dev/urandom | split -a 3 -b 51200 - $i/; done"
TARGETS = {
    "create_ms.p50": 10.0, "exec_ms.p50": 2.0, "creates_per_s": 150, "execs_per_s": 600, "fork_ms.p50": 15.0,
    "forks_64_s": 0.7, "live_mb": 3.0, "teardown_1000_s": 3.0,
}  # fmt: skip


def percentiles(taken_s: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(taken_s, q)) * 1000, 3) for q in (50, 99)}


async def timed(what: Callable[[], Awaitable[Any]], count: int = SAMPLES) -> dict[str, float]:
    taken_s: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await what()
        taken_s.append(time.perf_counter() - began)
    return percentiles(taken_s)


async def true(sandbox: NamespaceSandbox) -> None:
    done = await sandbox.exec("true", timeout_s=TIMEOUT_S)
    assert done.exit_code == 0, done


async def plain() -> None:
    process = await asyncio.create_subprocess_exec("bash", "-c", "true")
    await process.wait()


async def measure_creation(backend: NamespaceBackend) -> dict[str, Any]:
    ready_s: list[float] = []

    async def one() -> None:
        began = time.perf_counter()
        async with backend.acquire(SandboxSpec()):
            ready_s.append(time.perf_counter() - began)

    for _ in range(SAMPLES):
        await one()
    alone = percentiles(ready_s)
    ready_s.clear()
    turns = asyncio.Semaphore(8)
    async with contextlib.AsyncExitStack() as stack:

        async def kept() -> None:
            async with turns:
                began = time.perf_counter()
                await stack.enter_async_context(backend.acquire(SandboxSpec()))
                ready_s.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(kept() for _ in range(2 * SAMPLES)))
        rate = 2 * SAMPLES / (time.perf_counter() - began)
    return {"create_ms": alone, "create_8_ms": percentiles(ready_s), "creates_per_s": round(rate, 1)}


async def measure_commands(backend: NamespaceBackend) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        sandboxes = [await stack.enter_async_context(backend.acquire(SandboxSpec())) for _ in range(64)]
        alone = await timed(lambda: true(sandboxes[0]))

        async def many(sandbox: NamespaceSandbox) -> None:
            for _ in range(20):
                await true(sandbox)

        began = time.perf_counter()
        await asyncio.gather(*(many(sandbox) for sandbox in sandboxes))
        rate = 64 * 20 / (time.perf_counter() - began)
    return {"exec_ms": alone, "execs_per_s": round(rate, 1), "plain_ms": await timed(plain)}


async def measure_forks(backend: NamespaceBackend) -> dict[str, Any]:
    async with backend.acquire(ROOMY) as sandbox:
        done = await sandbox.exec(WORKSPACE_100_MB, timeout_s=TIMEOUT_S)
        assert done.exit_code == 0, done

        async def fork(count: int) -> None:
            forks = await sandbox.fork(count)
            await asyncio.gather(*(true(each) for each in forks))
            ended.extend(forks)

        ended: list[NamespaceSandbox] = []
        snapshot = await sandbox.snapshot()
        one = await timed(lambda: fork(1), 20)
        began = time.perf_counter()
        await fork(64)
        many_s = time.perf_counter() - began
        await asyncio.gather(*(each.stop() for each in ended))
        seal = await timed(lambda: dropped(backend, sandbox), 20)
        restore = await timed(lambda: sandbox.restore(snapshot), 20)
        await sandbox.exec("echo x > new", timeout_s=TIMEOUT_S)
        diff = await timed(sandbox.diff, 3)
    async with backend.acquire(ROOMY) as sandbox:
        await sandbox.exec(WORKSPACE_100_MB + "; sleep 1000 >/dev/null 2>&1 &", timeout_s=TIMEOUT_S)
        await asyncio.sleep(2.0)
        copy = await timed(lambda: dropped(backend, sandbox), 3)
    return {"seal_ms": seal, "copy_ms": copy, "fork_ms": one, "forks_64_s": round(many_s, 3), "restore_ms": restore,
            "diff_ms": diff}  # fmt: skip


async def dropped(backend: NamespaceBackend, sandbox: NamespaceSandbox) -> None:
    await backend.drop(await sandbox.snapshot())


def available_mb() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("MemAvailable"))


async def measure_crowd(backend: NamespaceBackend, live: int) -> dict[str, Any]:
    before_mb = available_mb()
    async with contextlib.AsyncExitStack() as stack:
        turns = asyncio.Semaphore(8)

        async def kept() -> NamespaceSandbox:
            async with turns:
                sandbox = await stack.enter_async_context(backend.acquire(SandboxSpec()))
                await true(sandbox)
                return sandbox

        sandboxes = await asyncio.gather(*(kept() for _ in range(live)))
        each_mb = (before_mb - available_mb()) / live
        thousand = sandboxes[:1000]
        began = time.perf_counter()
        await asyncio.gather(*(sandbox.stop() for sandbox in thousand))
        teardown_s = (time.perf_counter() - began) * 1000 / len(thousand)
        await asyncio.gather(*(sandbox.stop() for sandbox in sandboxes[1000:]))
    return {"live": live, "live_mb": round(each_mb, 2), "teardown_1000_s": round(teardown_s, 2)}


async def measure(live: int) -> dict[str, Any]:
    backend = NamespaceBackend()
    try:
        figures = {**await measure_creation(backend), **await measure_commands(backend)}
        figures |= {**await measure_forks(backend), **await measure_crowd(backend, live)}
    finally:
        await backend.stop()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--live", type=int, default=2000)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    report("sandbox_namespace", asyncio.run(measure(options.live)), TARGETS, save=options.save)


if __name__ == "__main__":
    main()
