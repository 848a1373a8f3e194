"""Stops everything in a sandbox for a while, and tells whether anything runs in it beside its agent."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from upspiral.sandbox.namespace.keeper import syscalls
from upspiral.sandbox.namespace.keeper.live import Live
from upspiral.sandbox.namespace.keeper.syscalls import Namespace

_FREEZE_TIMEOUT_S = 5.0
_EVERYONE = -1
_NONE, _HINDERED = 3, 4
_ATTEMPTS = 20


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
        with suppress(TimeoutError):  # whoever hinders it is running
            signal_all(live, signal.SIGCONT)
        live.signal(signal.SIGCONT)


def runs_nothing_else(live: Live) -> bool:
    """Whether it has no process but its first. Then that is left stopped, so that this remains true."""
    others = True
    live.signal(signal.SIGSTOP)
    try:
        with suppress(TimeoutError):  # only others can hinder it
            others = _has_children(live)
    finally:
        if others:
            live.signal(signal.SIGCONT)
    return not others


def _has_children(live: Live) -> bool:
    """Everybody in a pid namespace descends from its first process, and becomes its child when the parent dies. Whether
    there is a child the kernel tells exactly; of several, that are born and die meanwhile, it may leave some out."""
    try:
        with open(f"/proc/{live.process}/task/{live.process}/children", "rb") as file:
            return file.read(1) != b""
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return signal_all(live, 0)


def signal_all(live: Live, number: int) -> bool:
    """Signals all processes in a sandbox but its first one, as the kernel does it: none is missed because it was being
    born. False when there are none. Raises TimeoutError when they do not let it happen."""
    child = os.fork()
    if child == 0:
        _signal_from_outside(live, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == _HINDERED:
        raise TimeoutError("what runs in the sandbox could not be signalled: it stops or kills whoever tries")
    return code != _NONE


def _signal_from_outside(live: Live, number: int) -> NoReturn:
    """Not in the namespace itself: only its children are. Without root they are the same user as what runs there, which
    may stop or kill them before they have done anything."""
    try:
        namespace = live.open_pid_namespace()
        # A child must not tell the keeper of a SIGTERM that somebody in the sandbox has sent.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        syscalls.forbid_inspection()
        syscalls.enter(namespace, Namespace.PID)
        for _ in range(_ATTEMPTS):
            child = os.fork()
            if child == 0:
                _signal_from_inside(number)
            if (code := _exit_code(child)) in (0, _NONE):
                os._exit(code)
        os._exit(_HINDERED)
    except ProcessLookupError:
        os._exit(_NONE)
    finally:
        os._exit(0)


def _signal_from_inside(number: int) -> NoReturn:
    try:
        if os.getppid() == 0:  # it is inside: its parent is out of its sight, and everyone is not everyone
            os.kill(_EVERYONE, number)
    except ProcessLookupError:
        os._exit(_NONE)
    finally:
        os._exit(0)


def _exit_code(child: int) -> int:
    """A child that was stopped is killed: nobody would let it go on."""
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
