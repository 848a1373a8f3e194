"""What every agent does first, done before it is forked.

Python fills its caches and adapts its code as it runs, and all of that lies in memory: what an agent does for the first
time it writes in pages of its own, and what was done before its fork it shares.
"""

from __future__ import annotations

import gc
import json
import signal
import socket
from collections.abc import Callable
from dataclasses import replace

from upspiral.sandbox.inside import frames
from upspiral.sandbox.inside.agent import OPERATIONS
from upspiral.sandbox.inside.loop import READABLE
from upspiral.sandbox.inside.operations import Agent
from upspiral.sandbox.inside.settings import Settings

_SCRIPT = b"echo ready"
_TIMEOUT_S = 2.0
_REQUEST = {"do": "exec", "script_bytes": len(_SCRIPT), "env": {}, "cwd": "/", "timeout_s": _TIMEOUT_S, "op_id": ""}


def rehearse(settings: Settings) -> None:
    """Is an agent for the length of one command, which does nothing, outside of any sandbox."""
    here, there = socket.socketpair()
    agent = Agent(replace(settings, workspace="/", env={}, oom_fd=None, proc_fd=None), OPERATIONS)
    with here, there:
        agent.loop.watch(here.fileno(), READABLE, _stopper(agent, here))
        agent.attach(there)
        request = json.dumps({**_REQUEST, "output_bytes": None}).encode()
        here.send(
            frames.frame(frames.OPEN, 1, request) + frames.frame(frames.DATA, 1, _SCRIPT) + frames.frame(frames.END, 1)
        )
        agent.loop.run()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    del agent
    gc.collect()


def _stopper(agent: Agent, host: socket.socket) -> Callable[[int], None]:
    decoder = frames.Decoder()

    def hear(_events: int) -> None:
        if any(kind == frames.RESULT for kind, _, _ in decoder.feed(host.recv(frames.MAX_BODY_BYTES))):
            agent.loop.stop()

    return hear
