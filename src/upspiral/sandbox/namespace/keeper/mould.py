"""What sandboxes are forked from: a process that does nothing else.

Whatever a process writes to after a fork is copied, and the child keeps what was there before, for itself alone. The
keeper, which writes to much between two sandboxes, would leave each of them a megabyte; and its open descriptors, which
a fork copies as well, are as many as there are sandboxes.
"""

from __future__ import annotations

import array
import errno
import gc
import os
import signal
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn, Protocol

from upspiral.sandbox.namespace.keeper import MAX_MESSAGE_BYTES, syscalls
from upspiral.sandbox.namespace.keeper.syscalls import Namespace

_CLONED = int(Namespace.USER | Namespace.PID)
"""A sandbox's first process begins in these; it makes the others, which take longer, while the keeper goes on."""
_MAX_BYTES = 2 * MAX_MESSAGE_BYTES
_MAX_DESCRIPTORS = 3
_ANSWER = struct.Struct("=i")

_REHEARSALS = 10
"""Python adapts a function's code after eight calls."""


class Part(Protocol):
    """What is asked for is bytes; what they mean is nothing to the mould."""

    def play(self, asked: bytes, descriptors: Sequence[int]) -> NoReturn:
        """In a fresh child, which has these descriptors."""
        ...

    def rehearse(self, asked: bytes) -> None:
        """In the mould: what every child does, as far as that can be done there. It may leave descriptors open."""
        ...


class Mould:
    """Its children are the keeper's: they are waited for there, and die with it, as this process does."""

    def __init__(self, part: Part):
        self._part = part
        self._line: socket.socket | None = None
        self._process = 0

    def cast(self, asked: bytes, descriptors: Sequence[int], birthplace: int | None) -> int:
        """The process id of a new child, which is born in the control group of that open folder (version 2), if any.

        Raises ChildProcessError when the mould was killed, perhaps just after it made a child that nobody knows of; the
        next call makes another mould. OSError when there can be no child.
        """
        given = array.array("i", [*descriptors, *([] if birthplace is None else [birthplace])])
        line = self._line or self._start()
        try:
            line.sendmsg([bytes([birthplace is not None]), asked], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
            answer = line.recv(_ANSWER.size)
        except ConnectionError:
            answer = b""
        if not answer:
            self.end()
            raise ChildProcessError(errno.ECHILD, "the process that sandboxes are forked from was killed")
        (process,) = _ANSWER.unpack(answer)
        if process < 0:
            raise OSError(-process, f"no sandbox could be forked: {os.strerror(-process)}")
        return process

    def end(self) -> None:
        """Safe to call twice."""
        if self._line is not None:
            self._line.close()
            self._line = None
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)

    def _start(self) -> socket.socket:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = os.fork()
        if self._process == 0:
            try:
                _serve(there, self._part)
            finally:
                os._exit(1)
        there.close()
        self._line = here
        return here


def _serve(line: socket.socket, part: Part) -> None:
    """To the end of the line. Writes to as little memory as can be between two children. The first ones come before
    it has rehearsed: who wants but one sandbox does not wait for that."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    syscalls.die_with_parent(signal.SIGKILL)
    syscalls.close_from(3, {line.fileno()})
    rehearsals = 0
    content, space = bytearray(_MAX_BYTES), socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
    while True:
        size, controls, _, _ = line.recvmsg_into([content], space, socket.MSG_CMSG_CLOEXEC)
        if size == 0:
            return
        given = array.array("i", controls[0][2])
        try:
            process = syscalls.clone(_CLONED, given[-1] if content[0] else None, for_parent=True)
        except OSError as error:
            process = -(error.errno or errno.EAGAIN)
        if process == 0:
            part.play(bytes(content[1:size]), given)
        for descriptor in given:
            os.close(descriptor)
        line.send(_ANSWER.pack(process))
        if rehearsals < _REHEARSALS:
            rehearsals += 1
            with suppress(OSError):
                part.rehearse(bytes(content[1:size]))
            syscalls.close_from(3, {line.fileno()})
            gc.freeze()
