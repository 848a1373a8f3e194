"""Takes a client's frames into a sandbox, and what comes of them back, beside whatever else goes on in there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

from upspiral.errors import CapabilityError
from upspiral.sandbox.base import Sandbox
from upspiral.sandbox.inside import frames
from upspiral.sandbox.inside.frames import FrameError
from upspiral.sandbox.pool.pooled import PooledSandbox

MOST_OPERATIONS = 64
"""Of one client in one sandbox at a time."""
_FROM_CLIENT = (frames.OPEN, frames.DATA, frames.END, frames.ACK, frames.CONTROL)
_CANCEL = json.dumps({"cancel": True}).encode()
_TOO_MANY = json.dumps(
    {"error": "SandboxError", "message": f"{MOST_OPERATIONS} operations are under way; wait for one to end"}
).encode()


class AgentLink(Protocol):
    """What the connection to a sandbox's agent offers to whoever brings frames of his own."""

    def begin(self, take: Callable[[int, bytes], None]) -> int:
        """A number for an operation; `take` gets the kind and body of each frame that the agent sends for it."""
        ...

    def send(self, kind: int, number: int, body: bytes) -> None: ...

    def forget(self, number: int) -> None:
        """Frames of this operation are dropped from now on."""
        ...

    async def drain(self) -> None:
        """Returns when the agent has taken most of what was sent."""
        ...


def link_of(sandbox: Sandbox) -> AgentLink:
    """Raises CapabilityError for a sandbox without an agent."""
    if isinstance(sandbox, PooledSandbox):
        sandbox = sandbox.inner
    link = getattr(sandbox, "link", None)
    if link is None:
        raise CapabilityError("this backend's sandboxes have no agent, so a server can do nothing in them")
    return link


class Relay:
    """The operations of one client in one sandbox.

    Client and agent each believe themselves alone: numbers are changed on the way. What neither may do ends here: the
    client speaks only as a host does, in numbers of a host's; the agent sends no more than the client's window allows.
    """

    def __init__(self, link: AgentLink, deliver: Callable[[bytes], None], broken: Callable[[str], None]) -> None:
        self._link = link
        self._deliver = deliver
        self._broken = broken
        """The agent broke the rules."""
        self._numbers: dict[int, int] = {}
        """The agent's, by the client's."""
        self._windows: dict[int, int] = {}
        """What the agent may still send, by the client's numbers."""

    def from_client(self, kind: int, number: int, body: bytes) -> None:
        """Raises FrameError when the client breaks the rules."""
        if kind not in _FROM_CLIENT:
            raise FrameError(f"a client sends no frames of kind {kind}")
        if number >= frames.INSIDE:
            raise FrameError(f"operation {number} would be the agent's")
        if kind == frames.OPEN:
            self._open(number, body)
        elif number in self._numbers:
            if kind == frames.ACK:
                self._widen(number, body)
            self._link.send(kind, self._numbers[number], body)

    def close(self) -> None:
        """Gives up everything that is under way. A command with an op_id that another client waits for goes on."""
        for number in self._numbers.values():
            self._link.send(frames.CONTROL, number, _CANCEL)
            self._link.forget(number)
        self._numbers.clear()
        self._windows.clear()

    def _open(self, number: int, body: bytes) -> None:
        if number in self._numbers:
            raise FrameError(f"operation {number} is under way already")
        if len(self._numbers) >= MOST_OPERATIONS:
            self._deliver(frames.frame(frames.RESULT, number, _TOO_MANY))
            return
        self._check_opening(body)
        self._numbers[number] = self._link.begin(lambda kind, content: self._from_agent(number, kind, content))
        self._windows[number] = frames.WINDOW_BYTES
        self._link.send(frames.OPEN, self._numbers[number], body)

    def _check_opening(self, body: bytes) -> None:
        try:
            opening: Any = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise FrameError(f"what opens an operation is JSON: {error}") from error
        if not isinstance(opening, dict) or not isinstance(opening.get("do"), str):
            raise FrameError('what opens an operation is an object with "do"')

    def _widen(self, number: int, body: bytes) -> None:
        if len(body) != frames.COUNT.size:
            raise FrameError("an ACK has four bytes")
        self._windows[number] += frames.COUNT.unpack(body)[0]
        if self._windows[number] > frames.WINDOW_BYTES:
            raise FrameError("more was acknowledged than was sent")

    def _from_agent(self, number: int, kind: int, body: bytes) -> None:
        if number not in self._numbers:
            return
        if kind in (frames.DATA, frames.ERRORS):
            self._windows[number] -= len(body)
            if self._windows[number] < 0:
                self._broken("its agent sends more than it was allowed to")
                return
        elif kind == frames.RESULT:
            self._link.forget(self._numbers.pop(number))
            del self._windows[number]
        self._deliver(frames.frame(kind, number, body))
