"""Who started whom, by /proc: to end a command with all that it started and nothing else."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_RLIMIT_LOCKS, _LOCKS_LINE = 10, b"Max file locks"
_FIRST_MARK = 1 << 62
_MAX_ROUNDS = 50
_STOPPING_S = 0.001
_EVERYONE = -1
_DEATH_TIMEOUT_S = 5.0


class Seen(NamedTuple):
    """One line of /proc/PID/stat. Zombies are among them."""

    pid: int
    parent: int
    session: int


@dataclass(frozen=True)
class Lineage:
    """What tells the processes of one command from those of others.

    Most descend from its first process, `leader`, or are in that one's session. Who has lost its parent has become a
    child of this process, and may have made a session of its own, but has kept the command's mark.
    """

    leader: int
    mark: int
    """0: none."""

    def living(self, leader_lives: bool) -> list[Seen]:
        processes = all_processes()
        found = [each for each in processes if each.session == self.leader or self._has_lost_its_parent(each)]
        roots = [each.pid for each in found] + [self.leader] * leader_lives
        return list({each.pid: each for each in [*found, *descendants(roots, processes)]}.values())

    def signal(self, number: int, leader_lives: bool) -> None:
        """To all of them. What SIGKILL is for is stopped first, the leader's group at once, because it may fork faster
        than it is listed."""
        if leader_lives and number == signal.SIGKILL:
            send(self.leader, signal.SIGSTOP, group=True)
        _signal_all(lambda: self.living(leader_lives), number)

    def _has_lost_its_parent(self, process: Seen) -> bool:
        orphaned = process.parent == os.getpid() and process.pid != self.leader
        return orphaned and self.mark > 0 and mark_of(process.pid) == self.mark


def all_processes() -> list[Seen]:
    """Empty where there is no /proc."""
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    found = []
    for name in names:
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                found.append(Seen(int(name), int(fields[1]), int(fields[3])))
    return found


def descendants(roots: Sequence[int], processes: Sequence[Seen]) -> list[Seen]:
    children: dict[int, list[Seen]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process)
    found, waiting = [], list(roots)
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [process.pid for process in below]
    return found


def end_descendants() -> None:
    """Of this process; for an agent whose end does not take everything down by itself. Returns when they are gone: who
    loses its parent is a child of this process then."""
    me, deadline = os.getpid(), time.monotonic() + _DEATH_TIMEOUT_S
    _signal_all(lambda: descendants([me], all_processes()), signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)


def send(pid: int, number: int, group: bool = False) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or has become somebody else's
        (os.killpg if group else os.kill)(pid, number)


def _signal_all(find: Callable[[], list[Seen]], number: int) -> None:
    """For SIGKILL they are all stopped first and then killed together: the children of a dead process are somebody
    else's. Who runs ahead of that for too long is stopped with everybody else, where this is PID 1."""
    if number != signal.SIGKILL:
        for process in find():
            send(process.pid, number)
        return
    stopped, all_stand = _stop(find)
    world_stands = not all_stand and os.getpid() == 1
    if world_stands:
        send(_EVERYONE, signal.SIGSTOP)
        stopped |= _stop(find)[0]
    for pid in stopped:
        send(pid, signal.SIGKILL)
    if world_stands:
        send(_EVERYONE, signal.SIGCONT)


def _stop(find: Callable[[], list[Seen]]) -> tuple[set[int], bool]:
    """Until no others are found: whom it stopped, and whether all of them stand still.

    None is missed. Whoever has forked and ended meanwhile is found as a zombie, since this process does not reap now.
    A fork that is under way goes on under SIGSTOP, and its child may come after a look: so the last look begins when
    all have been seen to stand.
    """
    stopped, stood = set[int](), False
    for _ in range(_MAX_ROUNDS):
        found = {process.pid for process in find()}
        others = found - stopped
        if stood and not others:
            return stopped, True
        for pid in sorted(others, reverse=True):  # the youngest first: they are the ones that may be gone in a moment
            send(pid, signal.SIGSTOP)
        stopped |= others
        stood = not others and all(map(_stands, found))
        if not others and not stood:
            time.sleep(_STOPPING_S)
    return stopped, False


def _stands(pid: int) -> bool:
    """Each of its threads is stopped or dead."""
    try:
        return all(_state(f"/proc/{pid}/task/{thread}/stat") in b"TtZX" for thread in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return True


def sleeps(pid: int) -> bool:
    """It waits for something that may never come, or is stopped."""
    return _state(f"/proc/{pid}/stat") in b"STt"


def _state(stat_path: str) -> bytes:
    try:
        with open(stat_path, "rb") as file:
            return file.read().rpartition(b")")[2].split()[0]
    except OSError:
        return b"X"


def marks() -> Iterator[int]:
    """A mark is a limit on file locks, which Linux does not heed (RLIMIT_LOCKS): everybody inherits it, and can make it
    smaller but not larger. So each is smaller than the last one, and this process's own is larger."""
    hard = resource.getrlimit(_RLIMIT_LOCKS)[1]
    return itertools.count(_FIRST_MARK if hard == resource.RLIM_INFINITY else hard - 1, -1)


def mark_of(pid: int) -> int:
    """0: it has none, or is gone."""
    try:
        with open(f"/proc/{pid}/limits", "rb") as file:
            hard = next((line.split()[-2] for line in file if line.startswith(_LOCKS_LINE)), b"")
    except OSError:
        return 0
    return int(hard) if hard.isdigit() else 0
