"""A backend behind a server on loopback, for suites that run over every backend: all in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from upspiral.gateway.http import serve_app
from upspiral.sandbox.base import Capabilities, Sandbox, SandboxBackend, SandboxSpec, Snapshot
from upspiral.sandbox.pool import Pool
from upspiral.sandbox.remote import RemoteBackend
from upspiral.sandbox.server.app import SandboxServer
from upspiral.sandbox.server.tenants import Quota, Tenant, Tenants

_TOKEN = "a-token-of-the-suite"


class Remote:
    """Satisfies SandboxBackend. The server starts with the first sandbox, and is stopped with the backend."""

    def __init__(self, backend: SandboxBackend) -> None:
        self._backend = backend
        self._stack = contextlib.AsyncExitStack()
        self._starting = asyncio.Lock()
        self._remote: RemoteBackend | None = None

    @property
    def capabilities(self) -> Capabilities:
        return replace(self._backend.capabilities, mounts=False, forward_sockets=False)

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        async with (await self._started()).acquire(spec) as sandbox:
            yield sandbox

    async def drop(self, snapshot: Snapshot) -> None:
        await (await self._started()).drop(snapshot)

    async def stop(self) -> None:
        if self._remote is None:
            await self._backend.stop()
        await self._stack.aclose()

    async def _started(self) -> RemoteBackend:
        async with self._starting:
            if self._remote is None:
                tenants = Tenants([(_TOKEN, Tenant("suite", Quota(egress=True)))])
                server = SandboxServer(Pool(self._backend), tenants)
                self._stack.push_async_callback(server.drain, timeout_s=0.0)
                url = await self._stack.enter_async_context(serve_app(server.app))
                self._remote = await RemoteBackend(url, _TOKEN).connect()
                assert self._remote.capabilities == self.capabilities
                self._stack.push_async_callback(self._remote.stop)
            return self._remote
