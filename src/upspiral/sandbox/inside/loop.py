"""One thread, one epoll: descriptors that became ready, moments that came, children that ended."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

READABLE = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
WRITABLE = select.EPOLLOUT
_MAX_WAIT_S = 3600.0
"""The kernel takes 24 days at most, and a deadline may be further away than that."""


class Timer:
    """A callback to come. Cancelled, it stays in the heap until its time and does nothing."""

    def __init__(self, callback: Callable[[], None]):
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Calls back. What a callback raises ends the loop: a bug of ours, or a machine that is out of something."""

    def __init__(self, before_wait: Callable[[], None]):
        """`before_wait` is called each time before the loop sleeps. It may stop the loop, which then does not sleep."""
        self._before_wait = before_wait
        self._epoll = select.epoll()
        self._callbacks: dict[int, tuple[int, Callable[[int], None]]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._children: dict[int, Callable[[int, Any], None]] = {}
        self._stopping = False
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler the wake-up descriptor is not written to
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self.watch(self._wake_reader, READABLE, self._reap)

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        """Calls back with the events of a descriptor, from now on these. It must be forgotten before it is closed."""
        known = self._callbacks.get(descriptor)
        if known is None:
            self._epoll.register(descriptor, events)
        elif known[0] != events:
            self._epoll.modify(descriptor, events)
        self._callbacks[descriptor] = (events, callback)

    def forget(self, descriptor: int) -> None:
        if self._callbacks.pop(descriptor, None):
            self._epoll.unregister(descriptor)

    def after(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), timer))
        return timer

    def child(self, pid: int, callback: Callable[[int, Any], None]) -> None:
        """Calls back with the exit code of a child, negative for a signal, and with its resource usage."""
        self._children[pid] = callback

    def run(self) -> None:
        while not self._stopping:
            self._before_wait()
            if self._stopping:
                return
            wait_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else _MAX_WAIT_S
            for descriptor, events in self._epoll.poll(min(wait_s, _MAX_WAIT_S)):
                if known := self._callbacks.get(descriptor):
                    known[1](events)
            self._fire()

    def stop(self) -> None:
        self._stopping = True

    def _fire(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback:
                callback()

    def _reap(self, _events: int) -> None:
        """Takes every child that has ended, also those that nobody asked about: as PID 1 one inherits orphans."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_reader, 4096)
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if callback := self._children.pop(pid, None):
                callback(os.waitstatus_to_exitcode(status), usage)
