"""Lets go of a client that has stopped reading."""

from __future__ import annotations

import asyncio

from upspiral.gateway.limits import Limits


class ReaderWatch:
    """Looks whether a connection's client takes what waits for it. What is being answered learns of its end as of any
    client that leaves, and is cancelled."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, limits: Limits) -> None:
        self._loop = loop
        self._transport = transport
        self._limits = limits
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Until all is taken or `stop`. No effect when nothing waits."""
        self._unsent = self._transport.get_write_buffer_size()
        if self._timer is None and self._unsent:
            self._timer = self._loop.call_later(self._limits.stall_timeout_s, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._unsent - self._transport.get_write_buffer_size() < self._limits.stall_bytes:
            self._transport.abort()
        else:
            self.start()


class WatchedConnection(asyncio.BaseProtocol):
    """To be mixed into a protocol, before it: watches the client while the connection is not writable."""

    transport: asyncio.Transport
    _watch: ReaderWatch

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._watch.stop()
