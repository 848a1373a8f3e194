"""Agents that stand still because a child was stopped before it became a program.

posix_spawn lends the child its parent's memory: until the child has become the program, the kernel lets the parent
wait, and nothing but the child's end can help. Whatever runs as the agent's user can stop the child just then, and
nothing inside is there to set it free.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple


class Seen(NamedTuple):
    """Of /proc/PID/stat."""

    name: bytes
    state: bytes
    parent: int


def waits(process: int) -> bool:
    """In the kernel, for what no signal ends."""
    seen = _look(process)
    return seen is not None and seen.state == b"D"


def free(agent: int) -> None:
    """Ends the stopped children that are still called as the agent is: no command is."""
    if (parent := _look(agent)) is None:
        return
    for process in _processes():
        child = _look(process)
        if child is not None and child == Seen(parent.name, b"T", agent):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _look(process: int) -> Seen | None:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            head, _, rest = file.read().rpartition(b")")
    except OSError:
        return None
    state, parent, *_ = rest.split()
    return Seen(head.partition(b"(")[2], state, int(parent))
