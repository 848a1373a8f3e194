"""A server of sandboxes on a real port, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from upspiral.gateway.http import serve_app
from upspiral.sandbox.base import SandboxBackend
from upspiral.sandbox.pool import Pool, PoolLimits
from upspiral.sandbox.server.app import SandboxServer
from upspiral.sandbox.server.tenants import Quota, Tenant, Tenants

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef00"
DEFAULT_LIMITS = PoolLimits(warm_max=0)
DEFAULT_QUOTA = Quota()


@dataclass(frozen=True)
class LiveServer:
    url: str
    server: SandboxServer
    pool: Pool

    def client(self, token: str = ALICE) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(self.url, headers={"authorization": f"Bearer {token}"})


@asynccontextmanager
async def live_server(
    backend: SandboxBackend,
    limits: PoolLimits = DEFAULT_LIMITS,
    *,
    heartbeat_s: float = 60.0,
    quota: Quota = DEFAULT_QUOTA,
) -> AsyncIterator[LiveServer]:
    """With the tenants Alice, who has `quota`, and Bob. At the end everything has been stopped."""
    pool = Pool(backend, limits)
    tenants = Tenants([(ALICE, Tenant("alice", quota)), (BOB, Tenant("bob", Quota()))])
    server = SandboxServer(pool, tenants, heartbeat_s=heartbeat_s)
    async with serve_app(server.app) as url:
        try:
            yield LiveServer(url, server, pool)
        finally:
            await server.drain(timeout_s=0.0)
    assert pool.stats.live == 0 and pool.stats.made == pool.stats.stopped
