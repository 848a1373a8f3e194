"""How many sandboxes live at once, with their limits on, each of them answering, and what one weighs.

    python benchmarks/sandbox_density.py [--live 2000] [--save]

Another number is saved under a name of its own.

- `live`: sandboxes that were made, all of them alive at the same time, and that answered with what only they know,
  once after they were made and once more when all were there. `failures`: those that were not made, or did not answer
  so.
- `mb_each`: by how much less memory the machine has available (MemAvailable in /proc/meminfo) with all of them than
  without, through the number of them. That counts everything, whoever owns it: processes, page tables, namespaces,
  mounts, control groups, the keeper, and this process' own end of each. It also counts what others on the machine do
  meanwhile, so it is told beside `host_mb_each`, this process' share (resident memory), and `free_drift_mb`, by how
  much less was available after all were gone than before.
- `creates_per_s` and `execs_per_s`: eight in flight. `teardown_s`: of all of them.
- `left_over`: processes, control groups and folders of this owner after the end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from result import report
from sandbox_soak import descendants
from upspiral.errors import SandboxError
from upspiral.sandbox.base import Sandbox, SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend

IN_FLIGHT = 8
TIMEOUT_S = 120.0
SETTLE_S = 2.0
USUAL_LIVE = 2000
TARGETS = {"failures": 0, "left_over": 0, "mb_each": 3.0}


class Crowd:
    """Sandboxes by number; each has its number in a file."""

    def __init__(self, live: int):
        self.sandboxes: list[Sandbox | None] = [None] * live
        self.failed = set[int]()

    async def each(self, what: Callable[[int], Awaitable[None]]) -> float:
        """Does it for each number, eight at a time. Returns how many a second."""
        numbers = iter(range(len(self.sandboxes)))

        async def hand() -> None:
            for number in numbers:
                try:
                    await what(number)
                except SandboxError:
                    self.failed.add(number)

        began = time.perf_counter()
        await asyncio.gather(*(hand() for _ in range(IN_FLIGHT)))
        return round(len(self.sandboxes) / (time.perf_counter() - began), 1)

    async def ask(self, number: int) -> None:
        sandbox = self.sandboxes[number]
        done = await sandbox.exec("cat number", timeout_s=TIMEOUT_S) if sandbox is not None else None
        if done is None or (done.exit_code, done.stdout) != (0, str(number).encode()):
            self.failed.add(number)


async def measure(live: int) -> dict[str, Any]:
    crowd = Crowd(live)
    before_mb, host_before_mb = available_mb(), resident_mb()
    backend = NamespaceBackend()
    try:
        async with AsyncExitStack() as kept:

            async def make(number: int) -> None:
                spec = SandboxSpec(files={"number": str(number).encode()})
                crowd.sandboxes[number] = await kept.enter_async_context(backend.acquire(spec))
                await crowd.ask(number)

            creates_per_s = await crowd.each(make)
            execs_per_s = await crowd.each(crowd.ask)
            await asyncio.sleep(SETTLE_S)
            taken_mb, host_mb = before_mb - available_mb(), resident_mb() - host_before_mb
            began = time.perf_counter()
            await asyncio.gather(*(sandbox.stop() for sandbox in crowd.sandboxes if sandbox is not None))
            teardown_s = time.perf_counter() - began
    finally:
        await backend.stop()
    await asyncio.sleep(SETTLE_S)
    return {
        "live": live - len(crowd.failed),
        "failures": len(crowd.failed),
        "mb_each": round(taken_mb / live, 2),
        "host_mb_each": round(host_mb / live, 3),
        "free_drift_mb": round(before_mb - available_mb(), 1),
        "creates_per_s": creates_per_s,
        "execs_per_s": execs_per_s,
        "teardown_s": round(teardown_s, 2),
        "left_over": len(descendants()) + labelled_groups() + labelled_folders(),
        "limits": backend_limits(backend),
    }


def backend_limits(backend: NamespaceBackend) -> dict[str, str | bool]:
    """Which of them are on here."""
    can = backend.capabilities
    return {"memory": can.memory_limit, "cpu": can.cpu_limit, "disk": can.disk_quota}


def available_mb() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("MemAvailable"))


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def labelled_groups() -> int:
    return sum(
        f"-{os.getpid()}-" in name for _, below, _ in os.walk("/sys/fs/cgroup") for name in below if "upspiral-" in name
    )


def labelled_folders() -> int:
    return sum("upspiral-" in name and f"-{os.getpid()}-" in name for name in os.listdir("/dev/shm"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=int, default=USUAL_LIVE)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    name = "sandbox_density" if arguments.live == USUAL_LIVE else f"sandbox_density_{arguments.live}"
    report(name, asyncio.run(measure(arguments.live)), TARGETS, save=arguments.save)


if __name__ == "__main__":
    main()
