"""One sandbox in a client's hands: for how long, and what it was asked to do."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from upspiral.errors import SandboxBusyError, SandboxGoneError
from upspiral.sandbox.base import Sandbox, SandboxSpec
from upspiral.sandbox.server.once import Once
from upspiral.sandbox.server.relay import connection_of
from upspiral.sandbox.server.session import GONE, Session
from upspiral.sandbox.server.tenants import Tenant

_MOST_SESSIONS = 4
EXPIRED = "its lifetime ended"
DELETED = "it was stopped by its owner"


@dataclass(eq=False, slots=True)
class Lease:
    """Ends at its deadline, with its client's heartbeat, or when it is told to. Times are of the event loop."""

    tenant: Tenant
    spec: SandboxSpec
    sandbox: Sandbox
    heartbeat_s: float
    """After so long without a sign of its client it ends."""
    observe_exec: Callable[[float], None]
    """Called with the seconds that each command took."""
    id: str = field(default_factory=lambda: f"sb-{secrets.token_hex(12)}")
    made_at: float = field(init=False)
    seen_at: float = field(init=False)
    operations: Once = field(default_factory=Once)
    why_over: str = ""
    """Why it has ended, "" while it has not."""
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once nothing of the sandbox is left."""
    _sessions: dict[str, Session] = field(default_factory=dict)
    """The one that was opened last stands last."""
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.made_at = self.seen_at = asyncio.get_running_loop().time()

    @property
    def age_s(self) -> float:
        return asyncio.get_running_loop().time() - self.made_at

    @property
    def ends_in_s(self) -> float:
        return self.spec.limits.lifetime_s - self.age_s

    def seen(self) -> None:
        self.seen_at = asyncio.get_running_loop().time()

    def end(self, why: str) -> None:
        if not self.why_over:
            self.why_over = why
            self._over.set()
            for session in self._sessions.values():
                session.close(GONE, why)

    def session(self, session_id: str) -> Session:
        """The line of this id, a new one for a new id. Raises SandboxBusyError when there are too many,
        CapabilityError when the sandbox has no agent."""
        connection_of(self.sandbox)
        session = self._sessions.get(session_id)
        if session is None:
            self._forget_idle_sessions()
            session = self._sessions[session_id] = Session(
                lambda: connection_of(self.sandbox), seen=self.seen, observe_exec=self.observe_exec
            )
        elif session.is_over:
            raise SandboxGoneError("this line was ended; open another one")
        return session

    def _forget_idle_sessions(self) -> None:
        # First those that are over: another one's client may come back.
        for session_id, session in sorted(self._sessions.items(), key=lambda each: not each[1].is_over):
            if len(self._sessions) >= _MOST_SESSIONS and not session.is_carried:
                session.close(GONE, "its client opened others")
                del self._sessions[session_id]
        if len(self._sessions) >= _MOST_SESSIONS:
            raise SandboxBusyError(f"{_MOST_SESSIONS} connections to this sandbox stand; close one", retry_after_s=1.0)

    def check(self) -> None:
        """Raises SandboxGoneError once it has ended."""
        if self.why_over:
            raise SandboxGoneError(f"sandbox {self.id} is gone: {self.why_over}")

    async def until_over(self) -> None:
        """Returns once it has ended, and ends it at its deadline or without a heartbeat."""
        while not self.why_over:
            now = asyncio.get_running_loop().time()
            silent_at = self.seen_at + self.heartbeat_s
            if self.ends_in_s <= 0:
                self.end(EXPIRED)
            elif now >= silent_at:
                self.end(f"no sign of its client came for {self.heartbeat_s:g} s")
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(self.ends_in_s, silent_at - now)):
                        await self._over.wait()
