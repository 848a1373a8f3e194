"""Takes a client's frames into a sandbox, and what comes of them back, beside whatever else goes on in there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from upspiral.errors import CapabilityError, SandboxError
from upspiral.sandbox.base import Sandbox
from upspiral.sandbox.connected import ConnectedSandbox
from upspiral.sandbox.connection import BrokenRuleError, Connection
from upspiral.sandbox.inside import frames
from upspiral.sandbox.inside.frames import FrameError
from upspiral.sandbox.pool.pooled import PooledSandbox

MOST_OPERATIONS = 1024
"""On one line at a time."""
_FROM_CLIENT = (frames.OPEN, frames.DATA, frames.END, frames.ACK, frames.CONTROL)
_CANCEL = json.dumps({"cancel": True}).encode()
_LONGEST_WHY = 500


def connection_of(sandbox: Sandbox) -> Connection:
    """To the sandbox's agent. Raises CapabilityError for a sandbox without one."""
    if isinstance(sandbox, PooledSandbox):
        sandbox = sandbox.inner
    if not isinstance(sandbox, ConnectedSandbox):
        raise CapabilityError("this backend's sandboxes have no agent, so a server can do nothing in them")
    return sandbox.connection


class RelayedCall:
    """One operation of the client, as the connection to the agent sees it."""

    def __init__(self, number: int, relay: Relay, *, is_exec: bool) -> None:
        self.number = 0
        """The connection's own, once it has been entered there."""
        self.of_client = number
        self.window = frames.WINDOW_BYTES
        """What the agent may still send."""
        self.began = asyncio.get_running_loop().time()
        self.is_exec = is_exec
        self._relay = relay

    def take(self, kind: int, body: bytes) -> None:
        if kind in (frames.DATA, frames.ERRORS):
            self.window -= len(body)
            if self.window < 0:
                raise BrokenRuleError("more output than the window allows")
        self._relay.from_agent(self, kind, body)

    def fail(self, error: SandboxError) -> None:
        self._relay.call_lost(self, error)

    def wake(self) -> None:
        self._relay.woken.set()


class Relay:
    """The operations of one client in one sandbox.

    Client and agent each believe themselves alone: numbers are changed on the way. What neither may do ends here: the
    client speaks only as a host does, in numbers of a host's; the agent sends no more than the client's window allows.
    """

    def __init__(
        self,
        connection: Callable[[], Connection],
        deliver: Callable[[bytes], None],
        observe_exec: Callable[[float], None],
    ) -> None:
        """`connection` gives the one that stands now: a sandbox that was restored has another agent."""
        self._connection = connection
        self._deliver = deliver
        self._observe_exec = observe_exec
        self.woken = asyncio.Event()
        self._calls: dict[int, tuple[RelayedCall, Connection]] = {}
        """By the client's numbers."""

    def from_client(self, kind: int, number: int, body: bytes) -> None:
        """Raises FrameError when the client breaks the rules."""
        if kind not in _FROM_CLIENT:
            raise FrameError(f"a client sends no frames of kind {kind}")
        if number >= frames.INSIDE:
            raise FrameError(f"operation {number} would be the agent's")
        if kind == frames.OPEN:
            self._open(number, body)
        elif number in self._calls:
            call, connection = self._calls[number]
            if kind == frames.ACK:
                _widen(call, body)
            connection.write(frames.frame(kind, call.number, body))

    def from_agent(self, call: RelayedCall, kind: int, body: bytes) -> None:
        if kind == frames.RESULT:
            _, connection = self._calls.pop(call.of_client)
            connection.forget(call)
            self.woken.set()
            if call.is_exec:
                self._observe_exec(asyncio.get_running_loop().time() - call.began)
        self._deliver(frames.frame(kind, call.of_client, body))

    def call_lost(self, call: RelayedCall, error: SandboxError) -> None:
        """Its agent is gone. What the client asks next may find another one."""
        if self._calls.pop(call.of_client, None) is not None:
            self.woken.set()
            self._refuse(call.of_client, str(error))

    async def drain(self) -> None:
        """Returns when the agent has taken most of what was sent."""
        connection = self._connection()
        while connection.is_full and not connection.error and self._calls:
            self.woken.clear()
            await self.woken.wait()

    def close(self) -> None:
        """Gives up everything that is under way."""
        for call, connection in self._calls.values():
            connection.forget(call)
            connection.write(frames.frame(frames.CONTROL, call.number, _CANCEL))
        self._calls.clear()

    def _open(self, number: int, body: bytes) -> None:
        if number in self._calls:
            raise FrameError(f"operation {number} is under way already")
        opening = _opening(body)
        connection = self._connection()
        if len(self._calls) >= MOST_OPERATIONS:
            return self._refuse(number, f"{MOST_OPERATIONS} operations are under way; wait for one to end")
        if connection.error:
            return self._refuse(number, str(connection.error))
        call = RelayedCall(number, self, is_exec=opening.get("do") == "exec")
        self._calls[number] = call, connection
        connection.enter(call)
        connection.write(frames.frame(frames.OPEN, call.number, self._translated(opening, body)))

    def _refuse(self, number: int, why: str) -> None:
        result = json.dumps({"error": "SandboxError", "message": why[:_LONGEST_WHY]})
        self._deliver(frames.frame(frames.RESULT, number, result.encode()))

    def _translated(self, opening: dict[str, Any], body: bytes) -> bytes:
        """The shell that a command is to run in has a number, too."""
        if "shell" not in opening:
            return body
        shell = self._calls.get(opening["shell"]) if isinstance(opening["shell"], int) else None
        return json.dumps({**opening, "shell": shell[0].number if shell else 0}).encode()


def _opening(body: bytes) -> dict[str, Any]:
    try:
        opening = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"what opens an operation is JSON: {error}") from error
    if not isinstance(opening, dict):
        raise FrameError("what opens an operation is an object of JSON")
    return opening


def _widen(call: RelayedCall, body: bytes) -> None:
    if len(body) != frames.COUNT.size:
        raise FrameError("an ACK has four bytes")
    call.window += frames.COUNT.unpack(body)[0]
    if call.window > frames.WINDOW_BYTES:
        raise FrameError("more was acknowledged than was sent")
