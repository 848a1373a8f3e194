"""The actor that makes and serves sandboxes on its node."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from upspiral.config.models import SandboxConfig
from upspiral.gateway.http import serve_app
from upspiral.sandbox.egress.log_file import EgressFile
from upspiral.sandbox.open_files import allow_many
from upspiral.sandbox.pool import Pool, PoolLimits
from upspiral.sandbox.registry import make_backend
from upspiral.sandbox.server.app import SandboxServer
from upspiral.sandbox.server.tenants import Quota, Tenant, Tenants


class SandboxHost:
    """An asyncio actor. When it dies, the kernel takes its sandboxes down."""

    def __init__(self, config: SandboxConfig, egress_log: Path, token: str) -> None:
        self._config, self._egress_log, self._token = config, egress_log, token
        self._stack = AsyncExitStack()

    async def start(self) -> str:
        """The URL of the server."""
        import ray

        allow_many()
        backend = make_backend(self._config.backend, EgressFile(self._egress_log))
        quota = Quota(egress=True, private_hosts=True)  # the run file says what its sandboxes may reach
        tenants = Tenants([(self._token, Tenant("run", quota))])
        server = SandboxServer(Pool(backend, PoolLimits()), tenants)
        host = ray.util.get_node_ip_address()
        return await self._stack.enter_async_context(serve_app(server.app, host=host))

    async def live(self) -> None:
        """Never returns: who waits for it hears of the actor's death."""
        await asyncio.Event().wait()
