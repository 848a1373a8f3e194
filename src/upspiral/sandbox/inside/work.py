"""Work that takes its time, on folders: done by a forked child, so that the agent stays at hand, as the user's."""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import signal
import stat
from typing import Any

from . import frames
from .command import Inlet, Kept
from .identity import become
from .operations import Agent, Operation
from .running import Running

_MAX_COMPLAINT_BYTES = 4096
_BLOCK_BYTES = 64 << 10
_STANDSTILL_S = 20.0
"""Twice that is less than the host's patience, which would take the agent for broken."""


class Work(Operation):
    """A subclass does it in `work`, in the child: with input on descriptor 0, output on 1 and exceptions as results."""

    def __init__(self, agent: Agent, number: int, request: dict[str, Any]):
        super().__init__(agent, number, request)
        self._complaint = Kept(_MAX_COMPLAINT_BYTES)
        self._inlet: Inlet | None = None
        self._moved = False
        self._running = Running(agent, self._take, self._room, self._ended)
        self._path = agent.launcher.place(request["path"])

    def work(self) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self._inlet = Inlet(self, writer)
        try:
            self._running.start(lambda stdout, stderr, _mark: self._fork((reader, stdout, stderr)))
        finally:
            os.close(reader)
        self.agent.loop.after(_STANDSTILL_S, self._look)

    def used(self, count: int) -> None:
        self._moved = True
        super().used(count)

    def data(self, content: bytes) -> None:
        if self._inlet:
            self._inlet.put(content)

    def end(self) -> None:
        if self._inlet:
            self._inlet.end()

    def control(self, message: dict[str, Any]) -> None:
        return

    def produce(self) -> None:
        self._running.pull()

    def release(self) -> None:
        if self._inlet:
            self._inlet.close()
        self._running.abandon()

    def _look(self) -> None:
        """Ends a child that stands still although nobody here keeps it waiting: commands are the same user's, and may
        have stopped it, or put a pipe or a lease in its way."""
        if self.finished:
            return
        waits_for_host = not self.has_room or (self._inlet is not None and self._inlet.is_waiting)
        if not (self._moved or waits_for_host) and self._running.sleeps():
            return self.fail("OSError", "the work on it stood still and was ended")
        self._moved = False
        self.agent.loop.after(_STANDSTILL_S, self._look)

    def _take(self, kind: int, content: memoryview) -> None:
        self._moved = True
        if kind == frames.ERRORS:
            self._complaint.take(content)
        else:
            self.put(bytes(content))

    def _room(self) -> int:
        return frames.CHUNK_BYTES if self.has_room else 0

    def _ended(self, result: dict[str, Any]) -> None:
        if result["exit_code"] == 0:
            return self.finish()
        error, _, message = self._complaint.content.decode(errors="replace").partition("\n")
        self.fail(error or "OSError", message or f"the work on it was ended (exit code {result['exit_code']})")

    def _fork(self, stdio: tuple[int, int, int]) -> int:
        preload()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            self._prepare(stdio)
            self.work()
            code = 0
        except BaseException as error:
            name = type(error).__name__ if isinstance(error, OSError) else "OSError"
            os.write(2, f"{name}\n{getattr(error, 'strerror', None) or error}"[:_MAX_COMPLAINT_BYTES].encode())
        finally:
            os._exit(code)

    def _prepare(self, stdio: tuple[int, int, int]) -> None:
        """Leaves nothing of the agent's in the child: it works on what others have made."""
        signal.set_wakeup_fd(-1)
        os.setsid()
        for number, descriptor in enumerate(stdio):
            os.dup2(descriptor, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        settings = self.agent.settings
        if (limit := settings.rlimits.get("FSIZE")) is not None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        become(settings)


def preload() -> None:
    """Imports what a child needs, so that no child has to, and so that an agent may lose its sight of the library."""
    import shutil  # noqa: F401
    import tarfile  # noqa: F401


class Listing(Work):
    """`list`: all regular files below a folder, relative to it, each with a NUL behind it."""

    def work(self) -> None:
        os.chdir(self._path)
        with os.fdopen(1, "wb", _BLOCK_BYTES) as output:
            waiting = [b""]
            while waiting:
                folder = waiting.pop()
                try:
                    entries = os.scandir(folder or b".")
                except OSError:
                    continue
                with entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(folder + entry.name + b"/")
                        elif entry.is_file(follow_symlinks=False):
                            output.write(folder + entry.name + b"\0")


class Packing(Work):
    """`pack`: a folder as a tar. What cannot be read is an error; sockets are left out."""

    def work(self) -> None:
        import tarfile

        os.chdir(self._path)
        with os.fdopen(1, "wb", _BLOCK_BYTES) as output, tarfile.open(fileobj=output, mode="w|") as archive:
            archive.add(".", arcname=".")


class Unpacking(Work):
    """`unpack`: a tar, the input, into a folder. What leads out of the folder, and devices, are refused."""

    def work(self) -> None:
        import tarfile

        os.umask(0o022)
        os.makedirs(self._path, exist_ok=True)
        root = os.path.realpath(self._path)
        with os.fdopen(0, "rb", _BLOCK_BYTES) as source, tarfile.open(fileobj=source, mode="r|") as archive:
            archive.errorlevel = 1
            members = None
            if hasattr(tarfile, "tar_filter"):
                archive.extraction_filter = _checked  # type: ignore[assignment]
            else:  # before 3.9.17, 3.10.12 and 3.11.4; of those Debian's
                members = (_checked(member, root) for member in archive)
            archive.extractall(root, members)
            while source.read(_BLOCK_BYTES):
                pass  # padding behind the end


def _checked(member: Any, root: str) -> Any:
    """Of what is already there every link is followed, so that none of the archive's own leads out either."""
    if member.ischr() or member.isblk():
        raise OSError(f"{member.name!r} in the archive is a device")
    member = copy.copy(member)
    member.name = member.name.lstrip("/")
    if not _is_within(root, member.name):
        raise OSError(f"{member.name!r} in the archive leads out of the folder")
    if member.islnk() and not _is_within(root, member.linkname):
        raise OSError(f"{member.name!r} in the archive links to {member.linkname!r}, out of the folder")
    if member.isreg():
        _remove_pipe(os.path.realpath(os.path.join(root, member.name)))
    member.mode &= 0o755
    member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
    return member


def _remove_pipe(path: str) -> None:
    """Whoever opens one in place of a file to write waits for its reader."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.lstat(path).st_mode):
            os.unlink(path)


def _is_within(root: str, path: str) -> bool:
    return os.path.commonpath([root, os.path.realpath(os.path.join(root, path))]) == root
