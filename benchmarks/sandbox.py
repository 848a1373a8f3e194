"""How fast sandboxes are: made, taken warm, used, forked; beside plain processes, and beside docker where there is one.

    python benchmarks/sandbox.py [--backend namespace] [--docker-image IMAGE] [--save]

- `create_ms`: from asking for a sandbox to having one, one at a time. `creates_per_s`: eight in flight, each kept.
- `warm_acquire_ms`: the same from a pool that has one ready.
- `exec_ms`: `true`, to its result, one at a time. `exec_http_ms`: through a server in a process of its own, on loopback.
  `execs_per_s`: eight in flight, each in its own sandbox.
- `fork_ready_ms`: from asking for a fork of a workspace of 100 MB in 2,000 files to the end of a first command in it.
  `fork64_s`: from asking for 64 of them to the end of a first command in each.
- `plain_ms`: `bash -c true` as a bare subprocess of this program, in the same run; `exec_vs_plain` and `create_vs_plain` are
  ratios of medians to it.
- `create_vs_docker`, `exec_vs_docker`: how many times longer `docker run IMAGE true` and `docker exec CONTAINER true` take;
  null without a docker daemon that has the image.

Times as {p50, p99} of 200 samples in ms (fork: 20, docker: 10) unless the name says otherwise.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import numpy as np

from result import report
from upspiral.sandbox.base import Limits, Sandbox, SandboxBackend, SandboxSpec
from upspiral.sandbox.pool import Pool, PoolLimits
from upspiral.sandbox.registry import BACKENDS, make_backend
from upspiral.sandbox.remote import RemoteBackend

TIMEOUT_S = 60.0
SAMPLES, FORK_SAMPLES, DOCKER_SAMPLES = 200, 20, 10
IN_FLIGHT = 8
FORKS = 64
SPEC = SandboxSpec()
ROOMY = SandboxSpec(limits=Limits(memory_mb=1024, disk_mb=512, inodes=100_000))
WORKSPACE_100_MB = (
    "for i in {1..20}; do mkdir $i; head -c 5120000 /dev/urandom | split -a 3 -b 51200 - $i/; done; ls */* | wc -l"
)
TARGETS = {
    "create_ms.p50": 10.0, "warm_acquire_ms.p50": 1.0, "exec_ms.p50": 2.0, "exec_http_ms.p50": 5.0, "creates_per_s": 150,
    "execs_per_s": 600, "fork_ready_ms.p50": 15.0, "fork64_s": 0.7, "create_vs_docker": 20, "exec_vs_docker": 15,
    "exec_vs_plain": 3.0,
}  # fmt: skip

Figures = dict[str, Any]


def percentiles(taken_s: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(taken_s, q)) * 1000, 3) for q in (50, 99)}


async def timed(what: Callable[[], Awaitable[Any]], count: int = SAMPLES) -> dict[str, float]:
    taken_s: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await what()
        taken_s.append(time.perf_counter() - began)
    return percentiles(taken_s)


async def true(sandbox: Sandbox) -> None:
    done = await sandbox.exec("true", timeout_s=TIMEOUT_S)
    assert done.exit_code == 0, done


async def plain() -> None:
    process = await asyncio.create_subprocess_exec("bash", "-c", "true")
    await process.wait()


async def per_second(what: Callable[[int], Awaitable[Any]], count: int) -> float:
    """With so many in flight; `what` gets the number of the hand that does it."""
    numbers = iter(range(count))

    async def hand(which: int) -> None:
        for _ in numbers:
            await what(which)

    began = time.perf_counter()
    await asyncio.gather(*(hand(which) for which in range(IN_FLIGHT)))
    return round(count / (time.perf_counter() - began), 1)


async def measure_creation(backend: SandboxBackend) -> Figures:
    ready_s: list[float] = []
    for _ in range(SAMPLES):
        began = time.perf_counter()
        async with backend.acquire(SPEC):
            ready_s.append(time.perf_counter() - began)
    async with AsyncExitStack() as kept:
        rate = await per_second(lambda _: kept.enter_async_context(backend.acquire(SPEC)), 2 * SAMPLES)
    return {"create_ms": percentiles(ready_s), "creates_per_s": rate}


async def measure_warm(backend: SandboxBackend) -> Figures:
    pool = Pool(backend, PoolLimits())
    pool.keep_warm(SPEC, minimum=8)
    taken_s: list[float] = []
    for _ in range(SAMPLES):
        while pool.stats.warm < 4:
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        async with pool.acquire(SPEC):
            taken_s.append(time.perf_counter() - began)
    await pool.stop()  # and the backend with it
    return {"warm_acquire_ms": percentiles(taken_s)}


async def measure_commands(backend: SandboxBackend) -> Figures:
    async with AsyncExitStack() as kept:
        sandboxes = [await kept.enter_async_context(backend.acquire(SPEC)) for _ in range(IN_FLIGHT)]
        await asyncio.gather(*map(true, sandboxes))
        alone = await timed(lambda: true(sandboxes[0]))
        rate = await per_second(lambda which: true(sandboxes[which]), 10 * SAMPLES)
    return {"exec_ms": alone, "execs_per_s": rate, "plain_ms": await timed(plain)}


@contextmanager
def server(backend: str) -> Iterator[tuple[str, str]]:
    token = secrets.token_hex(16)
    process = subprocess.Popen(
        [sys.executable, "-m", "upspiral", "sandbox", "serve", "--backend", backend, "--port", "0", "--warm", "0"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "UPSPIRAL_SANDBOX_TOKEN": token},
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"], token
    finally:
        process.kill()
        process.wait(timeout=TIMEOUT_S)


async def measure_server(backend: str) -> Figures:
    with server(backend) as (url, token):
        remote = RemoteBackend(url, token)
        async with remote.acquire(SPEC) as sandbox:
            await true(sandbox)
            figures = {"exec_http_ms": await timed(lambda: true(sandbox))}
        await remote.stop()
    return figures


async def measure_forks(backend: SandboxBackend) -> Figures:
    if not backend.capabilities.snapshot:
        return {"fork_ready_ms": None, "fork64_s": None}
    async with backend.acquire(ROOMY) as sandbox:
        made = await sandbox.exec(WORKSPACE_100_MB, timeout_s=TIMEOUT_S)
        assert made.stdout == b"2000\n", made
        forks: list[Sandbox] = []

        async def fork(count: int) -> None:
            new = await sandbox.fork(count)
            await asyncio.gather(*map(true, new))
            forks.extend(new)

        await fork(1)  # the first one has the 100 MB to hand over; the others what little came since
        one = await timed(lambda: fork(1), FORK_SAMPLES)
        began = time.perf_counter()
        await fork(FORKS)
        many_s = time.perf_counter() - began
        await asyncio.gather(*(each.stop() for each in forks))
    return {"fork_ready_ms": one, "fork64_s": round(many_s, 3)}


@asynccontextmanager
async def container(image: str) -> AsyncIterator[str | None]:
    """A running one; None without a daemon that has the image."""
    options = ["--rm", "--network=none", "-d", "--entrypoint", "sleep", image, "1000"]
    try:
        started = subprocess.run(["docker", "run", *options], capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        yield None
        return
    if started.returncode != 0:
        yield None
        return
    name = started.stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["docker", "rm", "-f", name], capture_output=True, timeout=TIMEOUT_S)


async def measure_docker(image: str) -> Figures:
    async def run(*arguments: str) -> None:
        nothing = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec("docker", *arguments, stdout=nothing, stderr=nothing)
        assert await process.wait() == 0, arguments

    async with container(image) as name:
        if name is None:
            return {"docker_create_ms": None, "docker_exec_ms": None}
        once = ("run", "--rm", "--network=none", "--entrypoint", "true", image)
        return {
            "docker_create_ms": await timed(lambda: run(*once), DOCKER_SAMPLES),
            "docker_exec_ms": await timed(lambda: run("exec", name, "true"), DOCKER_SAMPLES),
        }


def ratio(figures: Figures, above: str, below: str) -> float | None:
    return round(figures[above]["p50"] / figures[below]["p50"], 2) if figures[above] and figures[below] else None


async def measure(name: str, docker_image: str) -> Figures:
    backend = make_backend(name)
    figures: Figures = {"backend": name}
    for part in (measure_creation, measure_commands, measure_forks, measure_warm):
        figures |= await part(backend)
    figures |= {**await measure_server(name), **await measure_docker(docker_image)}
    ratios = {
        "exec_vs_plain": ("exec_ms", "plain_ms"), "create_vs_plain": ("create_ms", "plain_ms"),
        "create_vs_docker": ("docker_create_ms", "create_ms"), "exec_vs_docker": ("docker_exec_ms", "exec_ms"),
    }  # fmt: skip
    return {**figures, **{ratio_name: ratio(figures, *pair) for ratio_name, pair in ratios.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="namespace", choices=list(BACKENDS))
    parser.add_argument("--docker-image", default="debian:stable-slim", help="one that the daemon has already")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.backend, arguments.docker_image))
    report("sandbox", figures, TARGETS, save=arguments.save)


if __name__ == "__main__":
    main()
