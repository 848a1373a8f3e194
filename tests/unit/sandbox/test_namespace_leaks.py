"""What is left of namespace sandboxes when their owner, their keeper, or both, end badly: nothing."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.sandbox.namespace_stage import (
    TIMEOUT_S,
    agents_of,
    assert_nothing_is_left,
    children_of,
    control_groups_of,
    in_backend,
    keepers,
    processes_with,
    wait_until,
)
from upspiral.errors import SandboxError, SandboxGoneError
from upspiral.sandbox.base import Limits, SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.sandbox.namespace.keeper_process import KeeperProcess
from upspiral.sandbox.owner import Owner

OWNER = """
import asyncio, sys
from pathlib import Path
from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend

async def main():
    backend = NamespaceBackend(Path(sys.argv[1]))
    async with backend.acquire(SandboxSpec()) as sandbox, backend.acquire(SandboxSpec()) as other:
        await other.exec("setsid sleep 27182 >/dev/null 2>&1 &", timeout_s=3000)
        await other.snapshot()
        await sandbox.exec("setsid sleep 27182 & sleep 27182", timeout_s=3000)

asyncio.run(main())
"""
NUM_SLEEPERS = 3
SLEEP_S = f"27{os.getpid()}"
"""Nobody else on this machine sleeps so long."""


def sleepers() -> list[int]:
    return processes_with(f"sleep\0{SLEEP_S}")


def start_owner(root: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER.replace("27182", SLEEP_S), str(root)], env=environment)
    wait_until(lambda: len(sleepers()) == NUM_SLEEPERS)
    return owner


def mounts_of_everybody() -> str:
    """Of the namespace that this process is in."""
    return Path("/proc/self/mounts").read_text()


def test_a_killed_owner_leaves_nothing(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    (keeper,) = children_of(owner.pid)
    owner.kill()
    owner.wait(TIMEOUT_S)
    wait_until(lambda: sleepers() == [] and not Path(f"/proc/{keeper}").exists())
    wait_until(lambda: control_groups_of(owner.pid) == [])
    assert len(list(tmp_path.iterdir())) == 1, "an empty folder, which nobody is left to remove"
    assert list(next(tmp_path.iterdir()).iterdir()) == []
    live = NamespaceBackend(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "the sweep removed the dead owner's folder"
    other = NamespaceBackend(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2, "and not those of the living"
    asyncio.run(live.stop())
    asyncio.run(other.stop())
    assert_nothing_is_left(tmp_path)
    assert str(tmp_path) not in mounts_of_everybody()


BEGINNER = """
import sys
from pathlib import Path
from upspiral.sandbox.namespace import NamespaceBackend
print("ready", flush=True)
NamespaceBackend(Path(sys.argv[1]))
"""


def test_an_owner_that_is_killed_while_its_keeper_starts_leaves_nothing_and_no_complaint(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    for delay_s in (0.0, 0.01, 0.03, 0.06, 0.09, 0.12):
        command = [sys.executable, "-c", BEGINNER, str(tmp_path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as owner:
            assert owner.stdout and owner.stdout.readline() == b"ready\n"
            time.sleep(delay_s)
            owner.kill()
            _, complaints = owner.communicate(timeout=TIMEOUT_S)  # its keeper holds stderr, too
        assert complaints == b"", complaints.decode()
    in_backend(lambda backend: asyncio.sleep(0), tmp_path)


def test_an_owner_that_is_killed_with_its_keeper_leaves_nothing_after_a_sweep(tmp_path: Path) -> None:
    owner = start_owner(tmp_path)
    (keeper,) = children_of(owner.pid)
    os.kill(keeper, signal.SIGSTOP)  # it cannot clear up
    owner.kill()
    os.kill(keeper, signal.SIGKILL)
    owner.wait(TIMEOUT_S)
    wait_until(lambda: sleepers() == [])
    in_backend(lambda backend: asyncio.sleep(0), tmp_path)
    assert control_groups_of(owner.pid) == []
    assert_nothing_is_left(tmp_path)


def test_a_killed_keeper_is_an_error_of_its_sandboxes_and_another_one_follows(tmp_path: Path) -> None:
    async def check(backend: NamespaceBackend) -> None:
        (keeper,) = keepers()
        async with backend.acquire(SandboxSpec()) as sandbox:
            snapshot = await sandbox.snapshot()
            running = asyncio.create_task(sandbox.exec(f"sleep {SLEEP_S}", timeout_s=TIMEOUT_S))
            await asyncio.sleep(0.2)
            os.kill(keeper, signal.SIGKILL)
            with pytest.raises(SandboxError):
                await running
            with pytest.raises(SandboxError):
                await sandbox.fork()
        wait_until(lambda: sleepers() == [])  # the kernel needs a moment
        async with backend.acquire(SandboxSpec()) as sandbox:
            assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"
            assert keepers() != [keeper]
        with pytest.raises(SandboxError, match="dropped"):
            async with backend.acquire(SandboxSpec(image=snapshot)):
                pass

    in_backend(check, tmp_path)


def test_a_keeper_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upspiral.sandbox.namespace.backend._CREATE_TIMEOUT_S", 0.5)
    monkeypatch.setattr("upspiral.sandbox.namespace.backend._STOP_TIMEOUT_S", 0.5)

    async def check(backend: NamespaceBackend) -> None:
        (keeper,) = keepers()
        async with backend.acquire(SandboxSpec()) as sandbox:
            os.kill(keeper, signal.SIGSTOP)
            with pytest.raises(SandboxError, match="did not answer"):
                async with backend.acquire(SandboxSpec()):
                    pass
            assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"
        assert keepers() == []
        async with backend.acquire(SandboxSpec()) as sandbox:
            assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

    in_backend(check, tmp_path)


def test_a_killed_agent_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    async def check(backend: NamespaceBackend) -> None:
        (keeper,) = keepers()
        async with backend.acquire(SandboxSpec()) as sandbox:
            (agent,) = agents_of(keeper)
            running = asyncio.create_task(sandbox.exec(f"sleep {SLEEP_S}", timeout_s=TIMEOUT_S))
            await asyncio.sleep(0.2)
            os.kill(agent, signal.SIGKILL)
            with pytest.raises(SandboxError):
                await running
            with pytest.raises(SandboxError):
                await sandbox.read("x")
        wait_until(lambda: (sleepers(), agents_of(keeper)) == ([], []))

    in_backend(check, tmp_path)


def test_sandboxes_are_forked_from_another_process_when_that_was_killed(tmp_path: Path) -> None:
    async def check(backend: NamespaceBackend) -> None:
        (keeper,) = keepers()
        async with backend.acquire(SandboxSpec()) as first:
            (mould,) = set(children_of(keeper)) - set(agents_of(keeper))
            os.kill(mould, signal.SIGKILL)
            async with backend.acquire(SandboxSpec()) as second:
                for sandbox in (first, second):
                    assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"
            assert mould not in children_of(keeper)

    in_backend(check, tmp_path)


def test_the_keeper_ends_a_lifetime_that_its_host_forgot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upspiral.sandbox.namespace.backend._LIFETIME_GRACE_S", -1.5)

    async def check(backend: NamespaceBackend) -> None:
        async with backend.acquire(SandboxSpec(limits=Limits(lifetime_s=2.0))) as sandbox:
            for _ in range(2):
                with pytest.raises(SandboxGoneError, match="lifetime"):
                    await sandbox.exec(f"sleep {SLEEP_S}", timeout_s=TIMEOUT_S)

    in_backend(check, tmp_path)


def test_whoever_gives_up_while_a_sandbox_is_made_leaves_nothing(tmp_path: Path) -> None:
    async def one(backend: NamespaceBackend, delay_s: float) -> None:
        async def hold() -> None:
            async with backend.acquire(SandboxSpec(files={"a": b"1"})) as sandbox:
                await sandbox.exec(f"sleep {SLEEP_S}", timeout_s=TIMEOUT_S)

        task = asyncio.create_task(hold())
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.wait([task], timeout=TIMEOUT_S)

    async def check(backend: NamespaceBackend) -> None:
        (keeper,) = keepers()
        chance = random.Random(7)
        for _ in range(4):
            await asyncio.gather(*(one(backend, chance.random() * 0.1) for _ in range(16)))

        def below() -> list[Path]:
            return [each for group in control_groups_of(os.getpid()) for each in group.iterdir() if each.is_dir()]

        for _ in range(100):
            if agents_of(keeper) == [] and below() == []:  # a group goes after the last process that is in it
                break
            await asyncio.sleep(0.05)
        assert (agents_of(keeper), sleepers(), below()) == ([], [], [])

    in_backend(check, tmp_path)


def test_what_is_refused_while_it_is_made_leaves_no_control_group(tmp_path: Path) -> None:
    async def check(backend: NamespaceBackend) -> None:
        if not backend.capabilities.cpu_limit:
            pytest.skip("the namespace backend may make no control groups here")
        with pytest.raises(SandboxError):
            async with backend.acquire(SandboxSpec(limits=Limits(cpus=0.001))):  # the kernel wants 0.01 at least
                pass
        assert [each for group in control_groups_of(os.getpid()) for each in group.iterdir() if each.is_dir()] == []

    in_backend(check, tmp_path)


def test_a_keeper_that_cannot_begin_leaves_no_control_groups(tmp_path: Path) -> None:
    label = Owner.this_process().label("namespace")
    with pytest.raises(SandboxError, match="No such file"):
        KeeperProcess(label, tmp_path / "none", None, lambda *_: None)
    assert_nothing_is_left(tmp_path)


HINDERED = """
import os, signal, subprocess, sys, time
from upspiral.sandbox.namespace.keeper import pause

HINDER = '''
import os, sys
if os.fork() == 0:
    print("up", flush=True)
    while True:
        try:
            os.kill(-1, int(sys.argv[1]))
        except ProcessLookupError:
            pass
os.wait()
'''

class Stage:
    group, process = None, 0  # of which the kernel tells no children, so that they have to be signalled
    def signal(self, number): pass
    def open_pid_namespace(self): return os.open(f"/proc/{self.first}/ns/pid", os.O_RDONLY)

reader, writer = os.pipe2(os.O_NONBLOCK)
signal.set_wakeup_fd(writer)
signal.signal(signal.SIGTERM, lambda *_: None)
stage, hinderer = Stage(), [sys.executable, "-c", HINDER, sys.argv[1]]
with subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", *hinderer], stdout=subprocess.PIPE) as inside:
    inside.stdout.readline()
    stage.first = open(f"/proc/{inside.pid}/task/{inside.pid}/children").read().split()[0]
    for _ in range(20):
        assert not pause.runs_nothing_else(stage)
        pause.resume(stage)
    inside.kill()
try:
    raise AssertionError(f"somebody told the keeper: {os.read(reader, 99)}")
except BlockingIOError:
    print("well")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a pid namespace without a user namespace")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL])
def test_what_signals_whoever_looks_into_its_sandbox_neither_hangs_nor_ends_the_keeper(number: signal.Signals) -> None:
    """Without root they are the same user."""
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", HINDERED, str(int(number))]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False)
    assert done.stdout == b"well\n", done.stderr.decode()


@pytest.mark.slow
def test_many_cycles(tmp_path: Path) -> None:
    """Creation, commands, forks and ends in eight hands, with kills in between."""

    async def hand(backend: NamespaceBackend, seed: int) -> int:
        chance, done = random.Random(seed), 0
        for _ in range(150):
            try:
                async with backend.acquire(SandboxSpec(files={"a": b"1"})) as sandbox:
                    assert (await sandbox.exec("cat a", timeout_s=TIMEOUT_S)).stdout == b"1"
                    if chance.random() < 0.2:
                        forks = await sandbox.fork(2)
                        await asyncio.gather(*(each.stop() for each in forks))
                    done += 1
            except SandboxError:
                await asyncio.sleep(0.05)
        return done

    async def kill_keepers() -> None:
        while True:
            await asyncio.sleep(3.0)
            for keeper in keepers():
                os.kill(keeper, signal.SIGKILL)

    async def check(backend: NamespaceBackend) -> None:
        killing = asyncio.create_task(kill_keepers())
        try:
            done = await asyncio.gather(*(hand(backend, seed) for seed in range(8)))
        finally:
            killing.cancel()
        assert sum(done) > 8 * 150 * 0.5

    in_backend(check, tmp_path)
