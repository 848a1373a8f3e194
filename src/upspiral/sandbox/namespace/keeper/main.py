"""Where the keeper's process begins, and how it ends: with its control socket, by SIGTERM, or with the thread of the
host that started it. All of its sandboxes end before it."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from upspiral.sandbox.inside.work import preload
from upspiral.sandbox.namespace.keeper import MAX_MESSAGE_BYTES, syscalls
from upspiral.sandbox.namespace.keeper.keeper import Keeper


def main(descriptor: int) -> None:
    """`descriptor` is the control socket. Its first message says what the keeper is to be; an answer follows."""
    control = socket.socket(fileno=descriptor)
    _settle()
    ended = _end_of_duty()
    content = control.recv(MAX_MESSAGE_BYTES)
    if not content:
        return  # the host has ended
    host: Mapping[str, Any] = json.loads(content)
    if host["dies_with_parent"]:
        syscalls.die_with_parent(signal.SIGTERM)
    try:
        keeper = Keeper(control, dict(host))
    except OSError as error:
        with suppress(BrokenPipeError):
            control.send(json.dumps({"problem": str(error)}).encode())
        return
    try:
        with suppress(EOFError, BrokenPipeError):  # the host has ended
            control.send(json.dumps(keeper.abilities()).encode())
            preload()
            gc.collect()
            gc.freeze()
            keeper.serve(ended)
    finally:
        keeper.end()


def _settle() -> None:
    os.umask(0o022)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 0)
    os.close(nothing)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_of_duty() -> int:
    """A descriptor that can be read from after SIGTERM. A handler that raises could break into the clearing up."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the host decides
    return reader
