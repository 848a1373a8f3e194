"""A server of sandboxes on a real port, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from upspiral.gateway.http import serve_app
from upspiral.sandbox.base import SandboxBackend
from upspiral.sandbox.pool import Pool, PoolLimits
from upspiral.sandbox.registry import TOKEN_VARIABLE
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


@contextmanager
def server_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`upspiral sandbox serve` as a process, with Alice as its tenant, and its URL."""
    command = [sys.executable, "-m", "upspiral", "sandbox", "serve", "--port", "0", *arguments]
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src"), TOKEN_VARIABLE: ALICE}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=variables, text=True) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            assert told["token"] is None, "whoever chose the token knows it"
            yield process, told["url"]
        finally:
            process.kill()


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
