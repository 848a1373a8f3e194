"""Single files: read and written in pieces, as the user whom commands run as."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Any

from . import frames
from .identity import assumed
from .opening import open_plainly
from .operations import Agent, Operation

_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""Not blocking: opening a pipe that nobody reads must not hold everybody up."""
_NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENXIO, errno.ENAMETOOLONG, errno.EISDIR}


class Reading(Operation):
    """`read`: the beginning of a regular file."""

    def __init__(self, agent: Agent, number: int, request: dict[str, Any]):
        super().__init__(agent, number, request)
        self._descriptor = -1
        self._missing = request["max_bytes"]

    def begin(self) -> None:
        path = self.agent.launcher.place(self.request["path"])
        try:
            with assumed(self.agent.settings):
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise FileNotFoundError(errno.ENOENT, "it is no regular file")
                self._descriptor = open_plainly(path, os.O_RDONLY | _FLAGS)
        except OSError as error:
            if error.errno in _NO_SUCH_FILE:
                raise FileNotFoundError(errno.ENOENT, error.strerror) from None
            raise
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise FileNotFoundError(errno.ENOENT, "it is no regular file")
        self.produce()

    def produce(self) -> None:
        while self.has_room and not self.finished:
            content = os.read(self._descriptor, min(self._missing, frames.CHUNK_BYTES))
            self._missing -= len(content)
            if content:
                self.put(content)
            else:
                self.finish()

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Writing(Operation):
    """`write`: makes or replaces a regular file, its content being the input."""

    def __init__(self, agent: Agent, number: int, request: dict[str, Any]):
        super().__init__(agent, number, request)
        self._descriptor = -1
        self._room = agent.settings.rlimits.get("FSIZE", 1 << 62)

    def begin(self) -> None:
        path = self.agent.launcher.place(self.request["path"])
        with assumed(self.agent.settings):
            try:
                self._descriptor = open_plainly(path, os.O_WRONLY | os.O_CREAT | _FLAGS, 0o600)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self._descriptor = open_plainly(path, os.O_WRONLY | os.O_CREAT | _FLAGS, 0o600)
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise FileExistsError(errno.EEXIST, "something that is no regular file is there")
            os.ftruncate(self._descriptor, 0)
            with contextlib.suppress(PermissionError):  # somebody else's file, which may be written all the same
                os.fchmod(self._descriptor, self.request["mode"])

    def data(self, content: bytes) -> None:
        self._room -= len(content)
        if self._room < 0:
            raise OSError(errno.EFBIG, f"larger than {self.agent.settings.rlimits['FSIZE']} bytes, the limit of a file")
        view = memoryview(content)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self.used(len(content))

    def end(self) -> None:
        self.finish()

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
