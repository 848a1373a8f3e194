"""Stops everything in a sandbox for a while, and tells whether anything runs in it beside its agent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from upspiral.sandbox.namespace.keeper import syscalls
from upspiral.sandbox.namespace.keeper.live import Live
from upspiral.sandbox.namespace.keeper.syscalls import Namespace

_FREEZE_TIMEOUT_S = 5.0
_EVERYONE = -1
_NONE = 3


@contextmanager
def paused(live: Live) -> Iterator[None]:
    """By signals where there is no control group; then what was stopped before goes on afterwards, too."""
    try:
        if live.group is not None:
            live.group.freeze(time.monotonic() + _FREEZE_TIMEOUT_S)
        else:
            live.signal(signal.SIGSTOP)
            signal_all(live, signal.SIGSTOP)
        yield
    finally:
        resume(live)


def resume(live: Live) -> None:
    """Safe to call when nothing was stopped, and when nothing lives."""
    if live.group is not None:
        live.group.thaw()
    else:
        signal_all(live, signal.SIGCONT)
        live.signal(signal.SIGCONT)


def runs_nothing_else(live: Live) -> bool:
    """Whether it has no process but its first. Then that is left stopped, so that this remains true."""
    live.signal(signal.SIGSTOP)
    if not signal_all(live, 0):
        return True
    live.signal(signal.SIGCONT)
    return False


def signal_all(live: Live, number: int) -> bool:
    """Signals all processes in a sandbox but its first one, as the kernel does it: none is missed because it was being
    born. False when there are none."""
    child = os.fork()
    if child == 0:
        _signal_from_inside(live, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != _NONE


def _signal_from_inside(live: Live, number: int) -> NoReturn:
    try:
        namespace = live.open_pid_namespace()
        syscalls.forbid_inspection()
        syscalls.enter(namespace, Namespace.PID)
        child = os.fork()  # only children are in the namespace
        if child == 0 and os.getppid() == 0:  # it is: its parent is out of its sight, and everyone is not everyone
            os.kill(_EVERYONE, number)
        elif child != 0 and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == _NONE:
            os._exit(_NONE)
    except ProcessLookupError:
        os._exit(_NONE)
    finally:
        os._exit(0)
