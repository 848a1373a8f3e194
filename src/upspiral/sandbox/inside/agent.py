"""What a keeper calls in a forked child, and `__main__` in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket

from .command import Execution, Program
from .files import Reading, Writing
from .operations import Agent, Ping
from .ports import Listener, Outward
from .processes import end_descendants
from .settings import Settings
from .shell import Shell, ShellRun
from .work import Listing, Packing, Unpacking

OPERATIONS = {
    "exec": Execution, "spawn": Program, "shell": Shell, "run": ShellRun, "read": Reading, "write": Writing,
    "list": Listing, "pack": Packing, "unpack": Unpacking, "connect": Outward, "ping": Ping,
}  # fmt: skip
"""By the name under which the host asks for them."""


def serve(connection: socket.socket, settings: Settings, listener: socket.socket | None = None) -> None:
    """Does what the other end of `connection` asks, until it is closed. As PID 1: returning ends the sandbox.

    Takes over the process: SIGCHLD, every child, and the descriptors of `settings`.
    """
    gc.freeze()  # a collection would write to every page that is shared with a keeper, which should have made one
    os.umask(0o022)
    if not os.path.exists(settings.workspace):
        with contextlib.suppress(OSError):  # commands will say so
            os.makedirs(settings.workspace)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each command that left something behind holds two
    agent = Agent(settings, OPERATIONS, listener)
    listeners = [Listener(agent, port) for port in settings.forward_ports]
    agent.attach(connection)
    agent.loop.run()
    del listeners
    if os.getpid() != 1:
        end_descendants()
