"""A sandbox of a pool, in its owner's hands."""

from __future__ import annotations

import time
from collections.abc import Sequence

from upspiral.errors import SandboxError
from upspiral.sandbox.base import (
    WORKSPACE,
    ByteStream,
    Command,
    Diff,
    ExecResult,
    Process,
    Sandbox,
    Shell,
    Snapshot,
)
from upspiral.sandbox.pool.books import Books
from upspiral.sandbox.pool.metrics import PoolMetrics


class PooledSandbox:
    """Passes everything on to the backend's sandbox; measures commands, and keeps the pool's books of forks."""

    def __init__(
        self, inner: Sandbox, owner: str, books: Books, metrics: PoolMetrics, *, is_fork: bool = False
    ) -> None:
        self.inner = inner
        self._owner = owner
        self._books = books
        self._metrics = metrics
        if is_fork:
            # It is its owner's to stop; the others end with the context that they were acquired in.
            books.forks.add(self)

    @property
    def id(self) -> str:
        return self.inner.id

    async def exec(self, command: str | Command, *, timeout_s: float) -> ExecResult:
        began = time.perf_counter()
        try:
            done = await self.inner.exec(command, timeout_s=timeout_s)
        except SandboxError:
            self._metrics.failed("exec")
            raise
        self._metrics.exec_s.observe(time.perf_counter() - began)
        return done

    async def spawn(self, command: str | Command) -> Process:
        return await self.inner.spawn(command)

    async def shell(self) -> Shell:
        return await self.inner.shell()

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        return await self.inner.read(path, max_bytes=max_bytes)

    async def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        await self.inner.write(path, content, mode=mode)

    async def list_files(self, path: str = WORKSPACE) -> Sequence[str]:
        return await self.inner.list_files(path)

    async def upload(self, archive: bytes, path: str = WORKSPACE) -> None:
        await self.inner.upload(archive, path)

    async def download(self, path: str = WORKSPACE, *, max_bytes: int = 1 << 28) -> bytes:
        return await self.inner.download(path, max_bytes=max_bytes)

    async def diff(self) -> Diff:
        return await self.inner.diff()

    async def snapshot(self) -> Snapshot:
        return await self.inner.snapshot()

    async def fork(self, count: int = 1) -> Sequence[PooledSandbox]:
        """Raises SandboxBusyError at once when the pool has no room for so many: whoever forks holds a sandbox, and two
        who wait for each other's would wait for ever."""
        self._books.reserve(count)
        children: Sequence[Sandbox] = ()
        try:
            children = await self.inner.fork(count)
        finally:
            self._books.forked(len(children), count, self._owner)
        return [PooledSandbox(each, self._owner, self._books, self._metrics, is_fork=True) for each in children]

    async def restore(self, snapshot: Snapshot) -> None:
        await self.inner.restore(snapshot)

    async def connect(self, port: int) -> ByteStream:
        return await self.inner.connect(port)

    async def stop(self) -> None:
        try:
            await self.inner.stop()
        finally:
            if self in self._books.forks:
                self._books.forks.remove(self)
                self._books.returned(self._owner)
                self._books.has_stopped()
