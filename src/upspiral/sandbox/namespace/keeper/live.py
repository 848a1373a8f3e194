"""A sandbox as the keeper knows it."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from upspiral.sandbox.namespace.keeper.control_groups import Group
from upspiral.sandbox.namespace.keeper.merged import FOLDER_FLAGS
from upspiral.sandbox.namespace.keeper.order import Order
from upspiral.sandbox.namespace.keeper.stack import Stack

LAST_WORDS, LAST_WORDS_BYTES = "last_words", 4096
"""A file on a sandbox's disk that nothing inside sees, beside what is seen."""


@dataclass(eq=False, slots=True)
class Live:
    """From the fork of its first process until that is dead."""

    order: Order
    stack: Stack
    """What it began on; its own disk lies above."""
    agent: int
    """The socket that its agent has, for one that may follow."""
    process: int
    line: socket.socket
    """To its first process: for what it needs, and for when it is ready, or why it is not. Then it is closed."""
    when_ready: Callable[[str], None]
    """To be called once, with a problem or ""."""
    begun_at: float = field(default_factory=time.monotonic)
    handle: int = -1
    """Of its first process (pidfd)."""
    pid_namespace: int = -1
    """Open where a keeper without privileges could not open it any more once the process has given up its own."""
    group: Group | None = None
    disk: int = -1
    """The tree of its own tmpfs, to be read, and to become a layer of others; -1 until it is ready."""
    problem: str = ""
    """Why it ended or could not begin."""
    when_dead: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.handle = os.pidfd_open(self.process)
        except OSError:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            raise

    def kill(self) -> None:
        """And with it everything inside; its end is an event of its handle."""
        self.signal(signal.SIGKILL)
        if self.group is not None:
            self.group.thaw()  # what is frozen does not die

    def signal(self, number: int) -> None:
        """To its first process."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, number)

    @property
    def is_ready(self) -> bool:
        """Or was."""
        return self.disk >= 0

    @property
    def is_dead(self) -> bool:
        """The kernel knows before the keeper has heard of it."""
        return is_over(self.handle, 0.0)

    def open_disk(self) -> int:
        """What it has written."""
        return os.open("u", FOLDER_FLAGS, dir_fd=self.disk)

    def has_written(self) -> bool:
        """Anything that can be seen, or that cannot be seen any more, since it began."""
        return self._is_filled("u")

    def has_shared_memory(self) -> bool:
        """Files in /dev/shm, which only this agent's sandbox has: they are on its disk, and in no layer."""
        return self._is_filled("s")

    def _is_filled(self, name: str) -> bool:
        folder = os.open(name, FOLDER_FLAGS, dir_fd=self.disk)
        try:
            with os.scandir(folder) as entries:
                return next(entries, None) is not None
        finally:
            os.close(folder)

    def open_pid_namespace(self) -> int:
        """The caller closes it."""
        if self.pid_namespace >= 0:
            return os.dup(self.pid_namespace)
        return os.open(f"/proc/{self.process}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def last_words(self) -> str:
        """What its agent said of its end. Where the disk was full it could say nothing."""
        try:
            words = os.open(LAST_WORDS, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.disk)
        except OSError:
            return ""
        try:
            return os.read(words, LAST_WORDS_BYTES).decode(errors="replace")
        finally:
            os.close(words)

    def forget(self) -> None:
        """Closes what is open. After its end."""
        self.line.close()
        for descriptor in (self.handle, self.pid_namespace, self.disk, self.agent):
            if descriptor >= 0:
                os.close(descriptor)


def is_over(handle: int, timeout_s: float) -> bool:
    """Whether the process of a pidfd is dead by then. (Not `select.select`, which knows but 1024 descriptors.)"""
    events = select.poll()
    events.register(handle, select.POLLIN)
    return bool(events.poll(timeout_s * 1000))
