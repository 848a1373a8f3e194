"""How fast sandboxes are: made, taken warm, used, forked; beside plain processes, and beside Docker where it is to be
had.

    python benchmarks/sandbox.py [--backend namespace] [--samples 200] [--save]

- `create_ms`: from asking for a sandbox to having one, one at a time. `creates_per_s`: eight in flight, each kept.
- `warm_acquire_ms`: the same from a pool that has one ready.
- `exec_ms`: `true`, to its result, one at a time. `exec_http_ms`: through a server in a process of its own, on
  loopback. `execs_per_s`: eight in flight, each in its own sandbox.
- `fork_ready_ms`: from asking for a fork of a workspace of 100 MB in 2,000 files, in which a file was written since the
  last one, to the end of a first command in it. `fork_again_ms`: the same where nothing was. `fork64_s`: from asking
  for 64 of them to the end of a first command in each. Of the same workspace: `seal_ms`, a snapshot where nothing
  runs and a file was written; `copy_ms`, one while something runs; `restore_ms`; `diff_ms`, all of it.
- `plain_ms`: `bash -c true` as a bare subprocess of this program, in the same run; `exec_vs_plain` and
  `create_vs_plain` are ratios of medians to it.
- `docker_create_ms`: `docker run --detach`, to the container's running, with no network and the limits of a sandbox;
  `docker_exec_ms`: `docker exec CONTAINER bash -c true`. Both with a small image of this machine's own programs, by
  the daemon that `docker` reaches, or by one that is started for this where that takes no more than root and
  `dockerd`.
- `create_vs_docker`, `exec_vs_docker`: how many times longer Docker takes; null without it, and `docker` says why.

Times as {p50, p99} of `samples` in ms (fork and Docker: a tenth of them) unless the name says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from result import ROOT, report
from upspiral.sandbox.base import Limits, Sandbox, SandboxBackend, SandboxSpec
from upspiral.sandbox.pool import Pool, PoolLimits
from upspiral.sandbox.registry import BACKENDS, make_backend
from upspiral.sandbox.remote import RemoteBackend

TIMEOUT_S = 60.0
IN_FLIGHT = 8
FORKS = 64
SPEC = SandboxSpec()
ROOMY = SandboxSpec(limits=Limits(memory_mb=1024, disk_mb=512, inodes=100_000))
WORKSPACE_100_MB = (
    "for i in {1..20}; do mkdir $i; head -c 5120000 /dev/urandom | split -a 3 -b 51200 - $i/; done; ls */* | wc -l"
)
TARGETS = {
    "create_ms.p50": 10.0, "warm_acquire_ms.p50": 1.0, "exec_ms.p50": 2.0, "exec_http_ms.p50": 5.0,
    "creates_per_s": 150, "execs_per_s": 600, "fork_ready_ms.p50": 15.0, "fork64_s": 0.7, "create_vs_docker": 20,
    "exec_vs_docker": 15, "exec_vs_plain": 3.0,
}  # fmt: skip

Figures = dict[str, Any]


def percentiles(taken_s: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(taken_s, q)) * 1000, 3) for q in (50, 99)}


async def timed(
    what: Callable[[], Awaitable[Any]], count: int, before: Callable[[], Awaitable[Any]] | None = None
) -> dict[str, float]:
    """`before` each of them there is something to do that does not count."""
    taken_s: list[float] = []
    for _ in range(count):
        if before is not None:
            await before()
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


async def measure_creation(backend: SandboxBackend, samples: int) -> Figures:
    ready_s: list[float] = []
    for _ in range(samples):
        began = time.perf_counter()
        async with backend.acquire(SPEC):
            ready_s.append(time.perf_counter() - began)
    async with AsyncExitStack() as kept:
        rate = await per_second(lambda _: kept.enter_async_context(backend.acquire(SPEC)), 2 * samples)
    return {"create_ms": percentiles(ready_s), "creates_per_s": rate}


async def measure_warm(backend: SandboxBackend, samples: int) -> Figures:
    pool = Pool(backend, PoolLimits())
    pool.keep_warm(SPEC, minimum=8)
    taken_s: list[float] = []
    for _ in range(samples):
        while pool.stats.warm < 4:
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        async with pool.acquire(SPEC):
            taken_s.append(time.perf_counter() - began)
    await pool.stop()  # and the backend with it
    return {"warm_acquire_ms": percentiles(taken_s)}


async def measure_commands(backend: SandboxBackend, samples: int) -> Figures:
    async with AsyncExitStack() as kept:
        sandboxes = [await kept.enter_async_context(backend.acquire(SPEC)) for _ in range(IN_FLIGHT)]
        await asyncio.gather(*map(true, sandboxes))
        alone = await timed(lambda: true(sandboxes[0]), samples)
        rate = await per_second(lambda which: true(sandboxes[which]), 10 * samples)
    return {"exec_ms": alone, "execs_per_s": rate, "plain_ms": await timed(plain, samples)}


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
        process.terminate()
        process.wait(timeout=TIMEOUT_S)


async def measure_server(backend: str, samples: int) -> Figures:
    with server(backend) as (url, token):
        remote = RemoteBackend(url, token)
        async with remote.acquire(SPEC) as sandbox:
            await true(sandbox)
            figures = {"exec_http_ms": await timed(lambda: true(sandbox), samples)}
        await remote.stop()
    return figures


async def measure_forks(backend: SandboxBackend, samples: int) -> Figures:
    if not backend.capabilities.snapshot:
        return {"fork_ready_ms": None, "fork_again_ms": None, "fork64_s": None}
    async with backend.acquire(ROOMY) as sandbox:
        made = await sandbox.exec(WORKSPACE_100_MB, timeout_s=TIMEOUT_S)
        assert made.stdout == b"2000\n", made
        forks: list[Sandbox] = []

        async def fork(count: int) -> None:
            new = await sandbox.fork(count)
            await asyncio.gather(*map(true, new))
            forks.extend(new)

        await fork(1)  # the first one has the 100 MB to hand over; the others what little came since
        one = await timed(lambda: fork(1), samples // 10, before=lambda: sandbox.write("new", b"1"))
        again = await timed(lambda: fork(1), samples // 10)
        await sandbox.write("new", b"2")
        began = time.perf_counter()
        await fork(FORKS)
        many_s = time.perf_counter() - began
        await asyncio.gather(*(each.stop() for each in forks))
        return {
            "fork_ready_ms": one,
            "fork_again_ms": again,
            "fork64_s": round(many_s, 3),
            **await measure_snapshots(backend, sandbox, samples),
        }


async def measure_snapshots(backend: SandboxBackend, sandbox: Sandbox, samples: int) -> Figures:
    if backend.capabilities.isolation != "namespace":
        return {}  # others have one kind of snapshot, and it is what a fork takes

    async def snapshot(how: str) -> None:
        made = await sandbox.snapshot()
        assert made.how == how, made
        await backend.drop(made)

    first = await sandbox.snapshot()
    figures = {
        "seal_ms": await timed(lambda: snapshot("sealed"), samples // 10, before=lambda: sandbox.write("new", b"3")),
        "restore_ms": await timed(lambda: sandbox.restore(first), samples // 10),
        "diff_ms": await timed(sandbox.diff, 3),
    }
    await sandbox.exec(f"rm -rf *; {WORKSPACE_100_MB}; sleep 1000 >/dev/null 2>&1 &", timeout_s=TIMEOUT_S)
    await asyncio.sleep(2.0)
    return {**figures, "copy_ms": await timed(lambda: snapshot("copied"), 3)}


async def measure_docker(samples: int) -> Figures:
    sys.path.insert(0, str(ROOT))
    from tests.sandbox.container_engines import docker_program, why_no_docker

    nothing: Figures = {"docker_create_ms": None, "docker_exec_ms": None}
    if reason := why_no_docker():
        return {"docker": reason, **nothing}
    docker = Docker(docker_program())
    try:
        with docker.image() as image:
            figures = {"docker_create_ms": await timed(lambda: docker.start(image), samples)}
            container = docker.containers[-1]
            figures["docker_exec_ms"] = await timed(
                lambda: docker.run("exec", container, "bash", "-c", "true"), samples
            )
            return {"docker": await docker.run("version", "--format", "{{.Server.Version}}"), **figures}
    except RuntimeError as error:
        return {"docker": str(error), **nothing}


class Docker:
    """Its program, and what was made by it here."""

    def __init__(self, program: str):
        self.containers: list[str] = []
        self._program = program

    async def run(self, *arguments: str) -> str:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(self._program, *arguments, stdout=pipe, stderr=pipe)
        stdout, stderr = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"docker {arguments[0]}: {stderr.decode(errors='replace').strip()[-500:]}")
        return stdout.decode().strip()

    async def start(self, image: str) -> None:
        limits = (f"--memory={SPEC.limits.memory_mb}m", f"--pids-limit={SPEC.limits.processes}")
        self.containers.append(await self.run("run", "--detach", "--network=none", *limits, image, "sleep", "1000"))

    @contextmanager
    def image(self) -> Iterator[str]:
        """A small one; it goes with all containers that were made of it."""
        from tests.fixtures.small_image import make_small_root

        name = f"localhost/upspiral-benchmark-{os.getpid()}"
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.Popen(
                ["tar", "-C", make_small_root(Path(folder, "root")), "-c", "."], stdout=subprocess.PIPE
            )
            self._run_now("import", "-", name, stdin=archive.stdout)
            archive.wait(timeout=TIMEOUT_S)
        try:
            yield name
        finally:
            if self.containers:
                self._run_now("rm", "--force", *self.containers)
            self._run_now("rmi", name)

    def _run_now(self, *arguments: str, stdin: IO[bytes] | None = None) -> None:
        subprocess.run([self._program, *arguments], stdin=stdin, capture_output=True, timeout=TIMEOUT_S, check=True)


def ratio(figures: Figures, above: str, below: str) -> float | None:
    return round(figures[above]["p50"] / figures[below]["p50"], 2) if figures[above] and figures[below] else None


async def measure(name: str, samples: int) -> Figures:
    backend = make_backend(name)
    figures: Figures = {"backend": name, "samples": samples}
    for part in (measure_creation, measure_commands, measure_forks, measure_warm):
        figures |= await part(backend, samples)
    figures |= {**await measure_server(name, samples), **await measure_docker(samples // 10)}
    ratios = {
        "exec_vs_plain": ("exec_ms", "plain_ms"), "create_vs_plain": ("create_ms", "plain_ms"),
        "create_vs_docker": ("docker_create_ms", "create_ms"), "exec_vs_docker": ("docker_exec_ms", "exec_ms"),
    }  # fmt: skip
    return {**figures, **{ratio_name: ratio(figures, *pair) for ratio_name, pair in ratios.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="namespace", choices=list(BACKENDS))
    parser.add_argument("--samples", type=int, default=200, help="at least 10")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.backend, arguments.samples))
    report("sandbox", figures, TARGETS, save=arguments.save)


if __name__ == "__main__":
    main()
