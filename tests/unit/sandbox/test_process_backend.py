"""The process backend: what it refuses, what it keeps commands from, what is left of it; `tests/sandbox` has more."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.sandbox.conformance import SLEEP, TIMEOUT_S, sleepers
from upspiral.errors import CapabilityError, SandboxError
from upspiral.sandbox.base import Limits, Sandbox, SandboxSpec
from upspiral.sandbox.inside.confine import landlock_abi
from upspiral.sandbox.owner import Owner, default_root, remove_tree
from upspiral.sandbox.process import ProcessBackend, sweep

PLAIN = SandboxSpec()
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give sandboxes users of their own")


@pytest.fixture
def root() -> Iterator[Path]:
    """Where every user can pass, unlike in pytest's folders."""
    folder = Path(tempfile.mkdtemp(prefix="process-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def in_sandbox(check: Callable[[Sandbox], Awaitable[None]], root: Path, spec: SandboxSpec = PLAIN) -> None:
    async def body() -> None:
        backend = ProcessBackend(root, allow_network=True)
        try:
            async with backend.acquire(spec) as sandbox:
                await check(sandbox)
        finally:
            await backend.stop()

    asyncio.run(asyncio.wait_for(body(), 120))


def test_no_network_is_refused_unless_it_is_accepted(root: Path) -> None:
    async def check() -> None:
        backend = ProcessBackend(root)
        assert not backend.capabilities.untrusted
        with pytest.raises(CapabilityError, match='network = "none"'):
            async with backend.acquire(SandboxSpec()):
                pass
        await backend.stop()

    asyncio.run(check())


def test_the_network_is_this_machine_s(root: Path) -> None:
    """What `allow_network` says is true."""

    async def check(sandbox: Sandbox) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            assert (await sandbox.exec(f"echo > /dev/tcp/127.0.0.1/{port}", timeout_s=TIMEOUT_S)).exit_code == 0

    in_sandbox(check, root)


@pytest.mark.skipif(landlock_abi() == 0, reason="needs a kernel with Landlock")
def test_files_outside_are_out_of_reach(root: Path) -> None:
    secret = root / "secret.txt"
    secret.write_text("sk-secret")
    secret.chmod(0o644)
    root.chmod(0o755)

    async def check(sandbox: Sandbox) -> None:
        said = await sandbox.exec(
            f"cat {secret}; ls {root} /home /tmp; for p in /tmp/x /var/tmp/x {root}/x /dev/shm/x ../x ~/../../x; do "
            "(echo hi > $p) 2>/dev/null && echo wrote $p; done; echo x > $HOME/x && echo x > $TMPDIR/x && echo fine",
            timeout_s=TIMEOUT_S,
        )
        assert said.stdout == b"fine\n", said
        for path in (str(secret), f"{root}/none", "/work/../../../secret.txt"):
            with pytest.raises(OSError):
                await sandbox.read(path)
        with pytest.raises(OSError):
            await sandbox.write(f"{root}/x", b"x")

    in_sandbox(check, root)
    assert os.listdir(root) == ["secret.txt"]


@pytest.mark.skipif(landlock_abi() < 6, reason="needs a kernel whose Landlock knows of signals")
def test_processes_outside_get_no_signals(root: Path) -> None:
    with subprocess.Popen(["sleep", "1000"]) as bystander:

        async def check(sandbox: Sandbox) -> None:
            done = await sandbox.exec(f"kill -9 {bystander.pid}", timeout_s=TIMEOUT_S)
            assert done.exit_code == 1 and b"not permitted" in done.stderr

        in_sandbox(check, root)
        assert bystander.poll() is None
        bystander.kill()


@AS_ROOT
def test_each_sandbox_is_a_user_of_its_own(root: Path) -> None:
    async def check() -> None:
        backend = ProcessBackend(root, allow_network=True)
        async with backend.acquire(SandboxSpec()) as one, backend.acquire(SandboxSpec()) as two:
            users = {(await each.exec("id -u", timeout_s=TIMEOUT_S)).stdout for each in (one, two)}
            assert len(users) == 2 and b"0\n" not in users
            where = (await one.exec("pwd", timeout_s=TIMEOUT_S)).stdout.decode().strip()
            other = await two.exec(f"ls {where}; cat {where}/x; echo x > {where}/y", timeout_s=TIMEOUT_S)
            assert other.stdout == b""
        await backend.stop()

    asyncio.run(check())


@AS_ROOT
def test_a_sandbox_whose_processes_are_used_up_still_takes_commands(root: Path) -> None:
    async def check(sandbox: Sandbox) -> None:
        await sandbox.exec("for i in {1..9}; do sleep 1000 & done", timeout_s=TIMEOUT_S)
        for _ in range(3):
            assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

    in_sandbox(check, root, SandboxSpec(limits=Limits(processes=10)))


@AS_ROOT
def test_a_folder_that_users_cannot_reach_is_no_task_s_fault(root: Path) -> None:
    closed = root / "closed"
    closed.mkdir(mode=0o700)

    async def check() -> None:
        backend = ProcessBackend(closed, allow_network=True)
        with pytest.raises(SandboxError, match="every user must be able to pass"):
            async with backend.acquire(SandboxSpec()):
                pass
        await backend.stop()

    asyncio.run(check())


def test_an_agent_that_cannot_start_says_why(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upspiral.sandbox.process.inside.__path__", [str(root / "nothing-here")])

    async def check() -> None:
        backend = ProcessBackend(root, allow_network=True)
        with pytest.raises(SandboxError, match=r"did not start: .*nothing-here"):
            async with backend.acquire(SandboxSpec()):
                pass
        await backend.stop()

    asyncio.run(check())
    assert os.listdir(root) == []


OWNER = """
import asyncio, sys
from pathlib import Path
from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.process import ProcessBackend

async def main():
    backend = ProcessBackend(Path(sys.argv[1]), allow_network=True)
    async with backend.acquire(SandboxSpec()) as sandbox:
        await sandbox.exec("setsid SLEEP & (setsid SLEEP &) ; SLEEP", timeout_s=3000)

asyncio.run(main())
"""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def test_a_killed_owner_leaves_nothing(root: Path) -> None:
    """Its agents end what runs as soon as it is dead; the folder goes with the next owner's start."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER.replace("SLEEP", SLEEP), str(root)])
    wait_until(lambda: len(sleepers()) == 3)
    owner.kill()
    owner.wait(TIMEOUT_S)
    wait_until(lambda: sleepers() == [])
    assert len(os.listdir(root)) == 1
    live = ProcessBackend(root)
    assert len(os.listdir(root)) == 1, "the sweep removed the dead owner's folder"
    ProcessBackend(root)
    assert len(os.listdir(root)) == 2, "and not those of the living"
    asyncio.run(live.stop())


def test_what_a_killed_agent_leaves_is_ended_too(root: Path) -> None:
    async def check() -> None:
        backend = ProcessBackend(root, allow_network=True)
        async with backend.acquire(SandboxSpec()) as sandbox:
            await sandbox.exec(f"setsid {SLEEP} & {SLEEP} &", timeout_s=TIMEOUT_S)
            os.kill(int(sandbox.id.split("-")[1]), 9)
            with pytest.raises(SandboxError):
                await sandbox.exec("true", timeout_s=TIMEOUT_S)
        assert sleepers() == []
        await backend.stop()

    asyncio.run(check())


UNPRIVILEGED = """
import asyncio, concurrent.futures.thread, encodings.idna, os, sys
from pathlib import Path
from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.process import ProcessBackend

os.setgroups([])
os.setresgid(61234, 61234, 61234)
os.setresuid(61234, 61234, 61234)

async def main():
    sys.executable = "/usr/bin/python3"
    backend = ProcessBackend(Path(sys.argv[1]), allow_network=True)
    async with backend.acquire(SandboxSpec(files={"a/b": b"text"})) as sandbox:
        done = await sandbox.exec("cat a/b; echo; id -u; cat /etc/shadow; ls -A | wc -l", timeout_s=60)
        print(done.stdout.decode(), (await sandbox.exec("sleep 100", timeout_s=0.3)).timed_out)
    await backend.stop()

asyncio.run(main())
"""


@AS_ROOT
def test_works_as_an_ordinary_user(root: Path) -> None:
    root.chmod(0o777)
    program = [sys.executable, "-c", UNPRIVILEGED, str(root)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["text", "61234", "1", "True"]
    assert os.listdir(root) == []


def test_what_filled_the_memory_is_swept_although_that_is_no_default_any_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = replace(Owner.this_process(), start_time=1)
    (root / dead.label("process")).mkdir()
    monkeypatch.setattr("upspiral.sandbox.owner._MEMORY", root)
    monkeypatch.setattr("upspiral.sandbox.owner._MIN_FREE_BYTES", 1 << 60)
    assert default_root() != root and root in [each.parent for each in sweep(None)]
    assert os.listdir(root) == []


def test_a_folder_is_removed_although_something_in_it_vanishes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> None:
        raise FileNotFoundError(path / "vanished")

    folder = root / "folder"
    (folder / "in").mkdir(parents=True)
    monkeypatch.setattr("upspiral.sandbox.owner.shutil.rmtree", interrupted)
    remove_tree(folder)
    assert not folder.exists()


def test_whoever_gives_up_while_a_sandbox_is_made_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        backend = ProcessBackend(root, allow_network=True)

        async def never(*_: object) -> None:
            begun.set()
            await asyncio.sleep(TIMEOUT_S)

        begun = asyncio.Event()
        monkeypatch.setattr("upspiral.sandbox.process.Connection.over", never)
        acquiring = asyncio.create_task(backend.acquire(PLAIN).__aenter__())
        await begun.wait()
        acquiring.cancel()
        await asyncio.wait([acquiring])
        (folder,) = root.iterdir()
        assert acquiring.cancelled() and os.listdir(folder) == []
        await backend.stop()

    asyncio.run(asyncio.wait_for(check(), 120))
