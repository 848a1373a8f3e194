"""One suite over every backend: which backends there are, and what a test says that it needs.

A test gets a `Stage`. It names what it needs beyond files and a life cycle (`stage.needs("commands")`), and is skipped
by that name on a backend that lacks it. After each test nothing may be left of the backend.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox import container_engines
from tests.sandbox.served import Remote
from upspiral.errors import SandboxError
from upspiral.sandbox.base import Capabilities, Command, ExecResult, Sandbox, SandboxBackend, SandboxSpec
from upspiral.sandbox.fake import FakeBackend
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.sandbox.namespace.host import check_host
from upspiral.sandbox.process import ProcessBackend

TIMEOUT_S = 60.0
"""Of one command. Generous: the machine may be busy, and nothing here comes near it."""
TEST_TIMEOUT_S = 200.0
SLEEP = f"sleep 27{os.getpid()}"
"""Nobody else on this machine sleeps so long."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A backend that the suite runs over."""

    name: str
    make: Callable[[Path], SandboxBackend]
    """Keeps what it makes below a folder, as far as that is its way."""
    has: frozenset[str]
    """What it can do that `Capabilities` has no field for; see `_ABILITIES`."""
    unavailable: Callable[[], str] = str
    """Why it cannot run on this machine; empty when it can."""
    is_slow: bool = False
    """Each sandbox takes it a second or so: only with --slow."""


_ABILITIES = {
    "commands": "runs commands",
    "contained_files": "keeps commands from files outside",
    "own_processes": "shows a sandbox no processes but its own",
    "robust_agent": "keeps commands from killing what serves the sandbox",
    "lifetime": "ends a sandbox that is too old",
    "hidden_host": "shows nothing of the machine's control groups, /sys, and paths",
    "differences": "tells what was written",
    "spared_agent": "ends commands before the agent when memory is short, whatever they try",
    "own_users": "has a user id for each sandbox, where it runs as root",
}


def _no_namespaces() -> str:
    try:
        check_host()
    except SandboxError as error:
        return str(error)
    return ""


_PROCESS = {"commands", "lifetime"} | ({"robust_agent", "contained_files"} if os.geteuid() == 0 else set())
_CONTAINER = frozenset(_ABILITIES) - {"hidden_host", "differences", "spared_agent", "own_users"}

BACKENDS = (
    Entry("fake", lambda root: FakeBackend(), frozenset()),
    Entry("process", lambda root: ProcessBackend(root, allow_network=True), frozenset(_PROCESS)),
    Entry("namespace", NamespaceBackend, frozenset(_ABILITIES), _no_namespaces),
    Entry("remote", lambda root: Remote(NamespaceBackend(root)), frozenset(_ABILITIES), _no_namespaces),
    Entry("docker", container_engines.docker_backend, _CONTAINER, container_engines.why_no_docker, True),
    Entry("podman", container_engines.podman_backend, _CONTAINER, container_engines.why_no_podman, True),
)


class Stage:
    """A backend, made anew for each test."""

    def __init__(self, entry: Entry, root: Path):
        self.entry = entry
        self.root = root

    @property
    def capabilities(self) -> Capabilities:
        return _capabilities_of(self.entry)

    def needs(self, *names: str) -> None:
        """Skips the test when the backend lacks one of these: abilities, or fields of Capabilities."""
        capabilities = self.capabilities
        for name in names:
            has = name in self.entry.has if name in _ABILITIES else getattr(capabilities, name)
            if not has or has == "none":
                pytest.skip(f"the {self.entry.name} backend lacks {name}")

    def run(self, check: Callable[[Sandbox], Awaitable[None]], **spec: Any) -> None:
        """Acquires one sandbox for a check."""

        async def body(backend: SandboxBackend) -> None:
            async with backend.acquire(SandboxSpec(**spec)) as sandbox:
                await check(sandbox)

        self.run_backend(body)

    def run_backend(self, check: Callable[[SandboxBackend], Awaitable[None]]) -> None:
        async def body() -> None:
            backend = self.entry.make(self.root)
            try:
                await check(backend)
            finally:
                await backend.stop()

        asyncio.run(asyncio.wait_for(body(), TEST_TIMEOUT_S))
        assert os.listdir(self.root) == [], "a backend that was stopped left something behind"
        assert processes_with(str(self.root)) == []

    def exec(self, command: str | Command, *, timeout_s: float = TIMEOUT_S, **spec: Any) -> ExecResult:
        """Runs one command, and asserts that the sandbox is alive afterwards."""
        results: list[ExecResult] = []

        async def check(sandbox: Sandbox) -> None:
            results.append(await sandbox.exec(command, timeout_s=timeout_s))
            assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

        self.run(check, **spec)
        return results[0]


@cache
def _capabilities_of(entry: Entry) -> Capabilities:
    """It takes a backend to tell them, and each is the same."""
    with tempfile.TemporaryDirectory(prefix="conformance-") as root:
        backend = entry.make(Path(root))
        try:
            return backend.capabilities
        finally:
            asyncio.run(backend.stop())


@contextmanager
def stage_of(entry: Entry) -> Iterator[Stage]:
    if reason := entry.unavailable():
        pytest.skip(f"the {entry.name} backend cannot run here: {reason}")
    root = Path(tempfile.mkdtemp(prefix="conformance-"))
    root.chmod(0o711)  # sandboxes may have user ids of their own
    try:
        yield Stage(entry, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def output_of(sandbox: Sandbox, script: str) -> bytes:
    """What a command prints that must succeed."""
    done = await sandbox.exec(script, timeout_s=TIMEOUT_S)
    assert done.exit_code == 0, done
    return done.stdout


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not await condition():
        assert time.monotonic() < deadline, f"it did not come true that {what}"
        await asyncio.sleep(0.05)


def processes_with(text: str) -> list[int]:
    """Processes on this machine that have this text in their command line or environment, this one not."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            content = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in content and int(path.name) != os.getpid():
            found.append(int(path.name))
    return found


def sleepers() -> list[int]:
    """Those that run SLEEP."""
    return processes_with(SLEEP.replace(" ", "\0") + "\0")


def with_limits(spec: SandboxSpec, **limits: Any) -> SandboxSpec:
    return replace(spec, limits=replace(spec.limits, **limits))
