"""Who started whom, by /proc: to end a command with all that it started and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

_MAX_ROUNDS = 50


class Seen(NamedTuple):
    """One line of /proc/PID/stat."""

    pid: int
    parent: int
    group: int
    session: int
    started_ticks: int


def all_processes() -> list[Seen]:
    """Empty where there is no /proc. Zombies are left out: there is nothing to end."""
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    found = []
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] not in (b"Z", b"X"):
                found.append(Seen(int(name), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19])))
    return found


def descendants(root: int, processes: list[Seen]) -> list[Seen]:
    children: dict[int, list[Seen]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process)
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [process.pid for process in below]
    return found


def signal_command(leader: int, number: int, leader_lives: bool) -> None:
    """To a command's first process, its session, and all that descends from it, by whatever sessions of their own.

    SIGKILL is repeated until nothing is found: what forks faster than it is listed loses its group at once.
    """

    def belonging() -> list[Seen]:
        processes = all_processes()
        below = descendants(leader, processes) if leader_lives else []
        return below + [each for each in processes if each.session == leader]

    if leader_lives and number == signal.SIGKILL:
        send(leader, number, group=True)
    _repeat(belonging, number)


def end_descendants() -> None:
    """Of this process; for an agent whose end does not take everything down by itself."""
    me = os.getpid()
    _repeat(lambda: descendants(me, all_processes()), signal.SIGKILL)


def ticks_now() -> int:
    """The moment, as /proc/PID/stat tells of a process's start."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def send(pid: int, number: int, group: bool = False) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or has become somebody else's
        (os.killpg if group else os.kill)(pid, number)


def _repeat(find: Callable[[], list[Seen]], number: int) -> None:
    """Signals every process once; for SIGKILL again and again, as they may have forked meanwhile."""
    done: set[int] = set()
    for _ in range(_MAX_ROUNDS):
        found = {process.pid for process in find()} - done
        if not found:
            return
        for pid in found:
            send(pid, number)
        done |= found
        if number != signal.SIGKILL:
            return
