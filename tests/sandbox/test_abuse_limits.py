"""Abuse: using more than there is for one sandbox. After each of them it answers, and nothing outside has felt it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.sandbox import probes
from tests.sandbox.conformance import TIMEOUT_S, Stage, output_of
from tests.sandbox.probes import python
from upspiral.sandbox.base import Command, ExecResult, Limits, Sandbox

LIMITS = Limits(memory_mb=128, processes=64, disk_mb=64, inodes=20_000, file_mb=1024)


@dataclass(frozen=True, slots=True)
class Abuse:
    script: str
    contained: Callable[[ExecResult], bool]
    needs: tuple[str, ...] = ("robust_agent",)
    timeout_s: float = TIMEOUT_S


def _prints(text: bytes) -> Callable[[ExecResult], bool]:
    return lambda done: done.stdout == text


def _complains(text: bytes) -> Callable[[ExecResult], bool]:
    return lambda done: text in done.stderr


def _ends(done: ExecResult) -> bool:
    """By itself or at its deadline; no more is asked."""
    return done.timed_out or done.exit_code is not None


_NO_FORK = _complains(b"Resource temporarily unavailable")
_NO_SPACE = _complains(b"No space left on device")

ABUSES = {
    "fork bomb": Abuse("b() { b | b & }; b; sleep 0.3", _NO_FORK, timeout_s=5),
    "fork bomb of sessions": Abuse(
        "cat > b <<'X'\nsetsid bash b & setsid bash b & wait\nX\nbash b; sleep 0.5", _ends, timeout_s=3
    ),
    "processes that wait": Abuse("for i in {1..500}; do sleep 100 & done; wait", _NO_FORK, timeout_s=2),
    "threads": Abuse(
        python("import threading, time\nfor i in range(5000):\n    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"),
        lambda done: done.exit_code != 0,
    ),
    "zombies": Abuse(python("import os, time\nfor i in range(40):\n    os.fork() or os._exit(0)\nprint(40)"), _prints(b"40\n")),
    "orphans": Abuse("for i in {1..40}; do (setsid sleep 0.05 &); done; sleep 0.3; echo x", _prints(b"x\n")),
    "memory bomb": Abuse(
        "x=$(head -c 600M /dev/zero | tr '\\0' x); echo survived", lambda done: done.stdout == b"", ("memory_limit",)
    ),
    "disk fill": Abuse("head -c 100M /dev/zero > big", _NO_SPACE, ("disk_quota",)),
    "disk fill in several folders": Abuse(
        "for d in /work /tmp /var/tmp /dev/shm; do head -c 25M /dev/zero > $d/big; done", _NO_SPACE, ("disk_quota",)
    ),
    "disk fill by files without names": Abuse(
        python("import os\nfiles = []\nfor i in range(100):\n    file = open('x', 'wb')\n    os.unlink('x')\n    files.append(file)\n    os.write(file.fileno(), bytes(1 << 20))"),
        _NO_SPACE,
        ("disk_quota",),
    ),
    "inode fill": Abuse("for i in {1..21000}; do > $i || break; done", _NO_SPACE, ("disk_quota",)),
    "inode fill by links": Abuse(
        python("import os\nopen('f', 'w')\nfor i in range(21000):\n    os.symlink('f', f'l{i}')"), _NO_SPACE, ("disk_quota",)
    ),
    "many names of one file": Abuse(
        python("import os\nopen('f', 'w')\nfor i in range(100_000):\n    os.link('f', f'l{i}')"), _ends, ("disk_quota",)
    ),
    "shared memory folder": Abuse("head -c 100M /dev/zero > /dev/shm/big", _NO_SPACE, ("disk_quota",)),
    "device folder": Abuse("head -c 1M /dev/zero > /dev/big", lambda done: done.exit_code != 0, ("untrusted",)),
    "sparse file": Abuse("truncate -s 2T huge; stat -c %s huge 2>/dev/null", lambda done: b"2199023255552" not in done.stdout),
    "open files": Abuse(python("files = [open('/dev/null') for i in range(5000)]"), _complains(b"Too many open files")),
    "open pipes": Abuse(
        python("import os\npipes = []\nwhile True:\n    pipes.append(os.pipe())\n    os.set_blocking(pipes[-1][1], False)\n    os.write(pipes[-1][1], bytes(65536))"),
        _complains(b"Too many open files"),
    ),
    "connections": Abuse(
        python("import socket\nlistener = socket.create_server(('127.0.0.1', 0), backlog=4096)\nlines = []\nwhile True:\n    lines.append(socket.create_connection(listener.getsockname(), 5))"),
        lambda done: done.exit_code == 1,
    ),
    "datagrams": Abuse(
        python("import socket\none, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\none.setblocking(False)\ntry:\n    while True:\n        one.send(bytes(60000))\nexcept BlockingIOError:\n    print('full')"),
        _prints(b"full\n"),
    ),
    "watches": Abuse(
        python("import ctypes, os\nlibc = ctypes.CDLL(None)\nhandles = [libc.inotify_init() for i in range(2000)]\nprint(min(handles))"),
        _prints(b"-1\n"),
    ),
    "deep folders": Abuse(
        python("import os\nfor i in range(5000):\n    os.mkdir('d')\n    os.chdir('d')\nprint('deep')"), _prints(b"deep\n")
    ),
    "output flood": Abuse("head -c 300M /dev/zero; head -c 300M /dev/zero >&2", lambda done: done.dropped_bytes > 500 << 20),
    "a line without end": Abuse("tr '\\0' x < /dev/zero", lambda done: done.timed_out, timeout_s=2),
    "hang": Abuse("sleep 1000", lambda done: done.timed_out, timeout_s=1),
    "hang that ignores": Abuse("trap '' TERM INT HUP QUIT; while :; do sleep 1; done", lambda done: done.timed_out, timeout_s=1),
    "stopped": Abuse("kill -STOP $$", lambda done: done.timed_out, timeout_s=1),
    "background that holds the output": Abuse("sleep 1000 & echo x", lambda done: done.stdout == b"x\n" and done.wall_s < 20),
    "binary output": Abuse("printf '\\x00\\xff\\xfe\\x80'", _prints(b"\x00\xff\xfe\x80")),
    "reading input": Abuse("cat; read x; echo end", _prints(b"end\n")),
    "output after the close of it": Abuse("exec 1>&- 2>&-; echo x; sleep 0.2", lambda done: done.stdout == b""),
    "giving files away": Abuse("touch f; chown 5:5 f; stat -c %u f; id -u", lambda done: len(set(done.stdout.split())) == 1),
    "a core": Abuse("ulimit -c unlimited; bash -c 'kill -SEGV $$'; ls -A", _prints(b""), ("untrusted",)),
    "signals that queue": Abuse(
        python("import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN})\ntry:\n    for i in range(1_000_000):\n        os.kill(os.getpid(), signal.SIGRTMIN)\nexcept BlockingIOError:\n    print('full')"),
        _ends,
        timeout_s=20,
    ),
    "locks on everything": Abuse(
        python("import fcntl, os\nfor path in ('/usr/bin/env', '/bin/bash', '/dev/null'):\n    file = os.open(path, os.O_RDONLY)\n    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\nprint('held')"),
        _ends,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ABUSES)
def test_abuse(stage: Stage, name: str) -> None:
    abuse = ABUSES[name]
    stage.needs("commands", *abuse.needs)
    done = stage.exec(abuse.script, timeout_s=abuse.timeout_s, limits=LIMITS)
    assert abuse.contained(done), done
    assert done.wall_s < abuse.timeout_s + 20


def needs_limit_of_all(stage: Stage) -> None:
    if stage.capabilities.memory_limit != "sandbox":
        pytest.skip(f'the {stage.entry.name} backend lacks memory_limit = "sandbox"')


def test_many_small_hoarders_end_before_the_agent(stage: Stage) -> None:
    """Each smaller than the agent, which the kernel might take for the one to blame."""
    stage.needs("commands", "memory_limit", "spared_agent")
    needs_limit_of_all(stage)

    async def check(sandbox: Sandbox) -> None:
        await sandbox.exec("head -c 60M /dev/zero > fill; head -c 60M /dev/zero > /dev/shm/fill", timeout_s=TIMEOUT_S)
        done = await sandbox.exec(probes.MANY_SMALL_HOARDERS, timeout_s=TIMEOUT_S)
        assert done.oom, done
        assert await output_of(sandbox, "echo alive") == b"alive\n"

    stage.run(check, limits=LIMITS)


def test_shared_memory_counts(stage: Stage) -> None:
    """It stays when those who wrote it are gone. What then finds no memory is a result, and removing it helps."""
    stage.needs("commands", "memory_limit")
    needs_limit_of_all(stage)

    async def check(sandbox: Sandbox) -> None:
        done = await sandbox.exec(python(probes.SHARED_MEMORY), timeout_s=TIMEOUT_S)
        assert done.oom and max(map(int, done.stdout.split())) <= 128, done
        after = await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)
        assert after.stdout == b"alive\n" or after.oom

    stage.run(check, limits=LIMITS)


def test_a_full_disk_is_a_full_disk_and_not_a_lack_of_memory(stage: Stage) -> None:
    stage.needs("commands", "disk_quota")
    done = stage.exec("head -c 100M /dev/zero > big; stat -c %s big", limits=LIMITS)
    assert not done.oom and b"No space left" in done.stderr
    assert 60 << 20 < int(done.stdout) <= 64 << 20


def test_what_a_full_disk_held_is_given_back(stage: Stage) -> None:
    stage.needs("commands", "disk_quota")

    async def check(sandbox: Sandbox) -> None:
        await sandbox.exec("head -c 100M /dev/zero > big", timeout_s=TIMEOUT_S)
        with pytest.raises(OSError):
            await sandbox.write("more", b"x" * (1 << 20))
        assert await output_of(sandbox, "rm big more; head -c 50M /dev/zero > again; stat -c %s again") == b"52428800\n"

    stage.run(check, limits=LIMITS)


def test_cores(stage: Stage) -> None:
    stage.needs("commands", "cpu_limit")
    busy = "for i in 1 2 3; do (timeout 2 bash -c 'while :; do :; done') & done; wait; times | tail -1"
    done = stage.exec(busy, limits=Limits(cpus=0.25))
    assert 0.1 < done.cpu_s < 1.6, "half a second is its share of two; three would keep two cores busy for four"


def test_one_command_s_deadline_is_not_another_s(stage: Stage) -> None:
    stage.needs("commands", "robust_agent")

    async def check(sandbox: Sandbox) -> None:
        await output_of(
            sandbox,
            "sleep 1000 >/dev/null 2>&1 & echo $! > server; setsid sleep 1000 >/dev/null 2>&1 & echo $! >> server",
        )
        hang = "trap '' TERM; (trap '' TERM; setsid sleep 1000 & sleep 1000) & sleep 1000"
        assert (await sandbox.exec(hang, timeout_s=1.0)).timed_out
        await output_of(sandbox, "for p in $(cat server); do kill -0 $p || exit 1; done")

    stage.run(check)


@pytest.mark.parametrize("size", [200_000, 4_000_000])
def test_a_script_or_an_environment_that_is_too_long_for_the_kernel(stage: Stage, size: int) -> None:
    """One argument has 128 KiB at most. What cannot start is a result, because whoever asked for it did that."""
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        done = await sandbox.exec(f": {'x' * size}; echo ran", timeout_s=TIMEOUT_S)
        assert done.stdout == b"ran\n"
        try:
            done = await sandbox.exec(Command("echo ran", env={"LONG": "x" * size}), timeout_s=TIMEOUT_S)
            assert done.exit_code == 126 and b"Argument list too long" in done.stderr, done
        except ValueError as error:
            assert size > 1 << 20 and "environment" in str(error)
        done = await sandbox.exec(f"ls {'x' * size}", timeout_s=TIMEOUT_S)
        assert done.exit_code in (2, 126), done
        assert await output_of(sandbox, "echo alive") == b"alive\n"

    stage.run(check)


def test_a_hundred_thousand_files(stage: Stage) -> None:
    """Scaled down from a million by the room that tests have."""
    stage.needs("commands", "robust_agent")
    make = "import os\nos.mkdir('many')\nfor i in range(100_000):\n    os.close(os.open(f'many/{i}', os.O_CREAT))"

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, python(make))
        assert len(await sandbox.list_files("many")) == 100_000
        with pytest.raises(OSError):
            await sandbox.download("many", max_bytes=1 << 20)
        assert await output_of(sandbox, "rm -rf many; echo alive") == b"alive\n"

    stage.run(check, limits=Limits(inodes=110_000, disk_mb=512, memory_mb=1024))


def test_a_crowd_of_commands(stage: Stage) -> None:
    """More than there may be processes: those that cannot start say so, and are not taken for a broken sandbox."""
    stage.needs("commands", "robust_agent")

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "mkfifo pipe")
        command = "echo $((6 * 7)); read -t 0.2 <> pipe; exit 0"  # a bash that cannot fork tries for 15 s
        done = await asyncio.gather(*(sandbox.exec(command, timeout_s=TIMEOUT_S) for _ in range(200)))
        assert any(each.stdout == b"42\n" for each in done)
        assert all(each.exit_code is not None for each in done)
        assert await output_of(sandbox, "echo alive") == b"alive\n"

    stage.run(check, limits=LIMITS)


def test_a_busy_sandbox_answers_in_time(stage: Stage) -> None:
    """Also when all its processes are busy and have put themselves first."""
    stage.needs("commands", "robust_agent")
    cores = len(os.sched_getaffinity(0))

    async def check(sandbox: Sandbox) -> None:
        spin = f"for i in {{1..{4 * cores}}}; do (nice -n -20 timeout 20 bash -c 'while :; do :; done' >/dev/null 2>&1 &); done"
        await output_of(sandbox, spin)
        done = await sandbox.exec("echo alive", timeout_s=15)
        assert done.stdout == b"alive\n", done

    stage.run(check)
