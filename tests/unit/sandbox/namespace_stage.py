"""What the tests of the namespace backend share: one backend, one sandbox, and what they may leave: nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from upspiral.sandbox.base import Command, ExecResult, SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.sandbox.namespace.sandbox import NamespaceSandbox

EMPTY = SandboxSpec()
TIMEOUT_S = 60.0
"""Generous: the machine may be busy. Nothing here comes near it."""


def in_backend(check: Callable[[NamespaceBackend], Awaitable[None]], root: Path) -> None:
    async def run() -> None:
        backend = NamespaceBackend(root)
        try:
            await check(backend)
        finally:
            await backend.stop()
            assert_nothing_is_left(root)

    asyncio.run(run())


def in_sandbox(check: Callable[[NamespaceSandbox], Awaitable[None]], root: Path, spec: SandboxSpec = EMPTY) -> None:
    async def run(backend: NamespaceBackend) -> None:
        async with backend.acquire(spec) as sandbox:
            await check(sandbox)

    in_backend(run, root)


def run_one(command: str, root: Path, spec: SandboxSpec = EMPTY, timeout_s: float = TIMEOUT_S) -> ExecResult:
    """Runs a command, and asserts that the sandbox is alive afterwards."""
    results: list[ExecResult] = []

    async def check(sandbox: NamespaceSandbox) -> None:
        results.append(await sandbox.exec(command, timeout_s=timeout_s))
        assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

    in_sandbox(check, root, spec)
    return results[0]


async def output_of(sandbox: NamespaceSandbox, script: str | Command) -> str:
    """What a command prints, which must succeed."""
    done = await sandbox.exec(script, timeout_s=TIMEOUT_S)
    assert done.exit_code == 0, done
    return done.stdout.decode()


@asynccontextmanager
async def one_sandbox(backend: NamespaceBackend, spec: SandboxSpec = EMPTY) -> AsyncIterator[NamespaceSandbox]:
    async with backend.acquire(spec) as sandbox:
        yield sandbox


def assert_nothing_is_left(root: Path) -> None:
    assert list(root.iterdir()) == []
    assert control_groups_of(os.getpid()) == []


def control_groups_of(owner: int) -> list[Path]:
    """Those that carry the label of a process."""
    found = []
    for folder, below, _ in os.walk("/sys/fs/cgroup"):
        found += [
            Path(folder, name) for name in below if name.startswith("upspiral-namespace-") and f"-{owner}-" in name
        ]
    return found


def keepers() -> list[int]:
    """Of this process, which may have other children: a daemon for tests of containers."""
    return [each for each in children_of(os.getpid()) if b"keeper" in Path(f"/proc/{each}/cmdline").read_bytes()]


def children_of(process: int) -> list[int]:
    """Living ones, of whichever of its threads."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(each) for each in path.read_text().split()]
    return [each for each in found if not _is_zombie(each)]


def agents_of(keeper: int) -> list[int]:
    """Its children in a world of their own; the one that they are forked from is not."""
    return [each for each in children_of(keeper) if _pid_namespace(each) != _pid_namespace(keeper)]


def _pid_namespace(process: int) -> str:
    try:
        return os.readlink(f"/proc/{process}/ns/pid")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def processes_with(text: str) -> list[int]:
    """Ids of the processes on this machine whose command line has this text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)
