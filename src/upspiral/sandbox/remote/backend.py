"""RemoteBackend: sandboxes that a server leases."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from upspiral.errors import CapabilityError, ConfigError, SandboxBusyError, SandboxError
from upspiral.sandbox.base import Capabilities, Limits, SandboxSpec, Snapshot
from upspiral.sandbox.open_files import allow_many
from upspiral.sandbox.remote.api import Api
from upspiral.sandbox.remote.line import back_within_s
from upspiral.sandbox.remote.sandbox import RemoteSandbox
from upspiral.sandbox.server.wire import (
    PATIENCE_S,
    RETURN_S,
    CreateRequest,
    HeartbeatAnswer,
    HeartbeatRequest,
    LeaseAnswer,
    ListedSandbox,
    Listing,
)

DEFAULT_LIMITS = Limits()
_FAREWELL_S = 3.0
"""How long a server that cannot be reached is told that something is not wanted any more; it finds out by itself."""
_LIST_S = 2.0
_BEATS = 4
"""Heartbeats in the time after which the server would give its sandboxes up."""
_LOG = logging.getLogger(__name__)


class RemoteBackend:
    """Leases sandboxes from the server at `url` (http:// or https://) with a tenant's token. Belongs to one event loop.

    Requests whose answers are lost are repeated; the server does them once. What this process holds is kept alive by
    heartbeats, and stopped by the server when they do not come any more.

    Capabilities are the server's, and known once `connect` or the first `acquire` has asked for them.
    """

    def __init__(self, url: str, token: str, *, patience_s: float = PATIENCE_S) -> None:
        if not back_within_s(patience_s) < RETURN_S:
            raise ConfigError(
                f"patience_s = {patience_s:g} is longer than servers keep a line that was lost; give less than "
                f"{RETURN_S - back_within_s(0.0):g}"
            )
        self.patience_s = patience_s
        """How long a lost connection to a sandbox is tried to be taken up again before the sandbox counts as broken."""
        allow_many()
        self._api = Api(url, token)
        self._capabilities: Capabilities | None = None
        self._live: dict[str, RemoteSandbox] = {}
        self._snapshots: set[str] = set()
        self._heart: asyncio.Task[None] | None = None
        self._farewells: set[asyncio.Task[None]] = set()

    @property
    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            raise SandboxError(f"what the server at {self._api.url} can do is not known yet; await connect() first")
        return self._capabilities

    async def connect(self) -> RemoteBackend:
        """Asks the server what it can do. Raises SandboxError when it cannot be reached or refuses the token."""
        if self._capabilities is None:
            self._capabilities = await self._api.get("/capabilities", Capabilities)
        return self

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[RemoteSandbox]:
        await self.connect()
        self.capabilities.check(spec, backend="remote")
        sandbox = self.adopt(await self._create(spec), spec.limits)
        try:
            yield sandbox
        finally:
            await asyncio.shield(sandbox.stop())

    async def drop(self, snapshot: Snapshot) -> None:
        # First, so that no heartbeat keeps it when the server does not hear of this.
        self._snapshots.discard(snapshot.id)
        await self._api.delete(f"/snapshots/{snapshot.id}")

    async def attach(self, sandbox_id: str, limits: Limits = DEFAULT_LIMITS) -> RemoteSandbox:
        """A sandbox that the tenant has already, perhaps from a process that died. A command that had an op_id, asked
        for again, is not run again. Raises SandboxGoneError when there is none of this id any more."""
        return self.adopt(await self._api.get(f"/sandboxes/{sandbox_id}", LeaseAnswer), limits)

    async def list_sandboxes(self) -> Sequence[ListedSandbox]:
        """All that the tenant has on the server, those of other processes among them. Raises SandboxError soon when
        the server cannot be reached: somebody sits and waits."""
        return (await self._api.get("/sandboxes", Listing, repeat_s=_LIST_S)).sandboxes

    async def stop(self) -> None:
        await asyncio.gather(*(sandbox.stop() for sandbox in list(self._live.values())))
        await asyncio.gather(*(self._farewell(f"/snapshots/{each}") for each in self._snapshots))
        self._snapshots.clear()
        if self._heart is not None:
            self._heart.cancel()
        await asyncio.gather(*self._farewells, return_exceptions=True)
        await self._api.close()

    # For its sandboxes

    def adopt(self, lease: LeaseAnswer, limits: Limits) -> RemoteSandbox:
        sandbox = self._live[lease.id] = RemoteSandbox(self._api, self, lease, limits)
        if self._heart is None:
            every_s = lease.heartbeat_s / _BEATS
            if every_s + back_within_s(self.patience_s) > lease.heartbeat_s:
                _LOG.warning(
                    "%s gives sandboxes up after %g s without a sign of their client; a line that is lost for up to "
                    "%g s may come back too late", self._api.url, lease.heartbeat_s, self.patience_s,
                )  # fmt: skip
            self._heart = asyncio.create_task(self._beat(every_s))
        return sandbox

    def adopt_snapshot(self, snapshot: Snapshot) -> None:
        self._snapshots.add(snapshot.id)

    async def let_go(self, sandbox: RemoteSandbox) -> None:
        """Tells the server that it may stop; without an answer it will, when no heartbeat names it."""
        if sandbox.id in self._live:
            try:
                await self._farewell(f"/sandboxes/{sandbox.id}")
            finally:
                # Not before: `stop` waits for those that are in there.
                self._live.pop(sandbox.id, None)

    async def _create(self, spec: SandboxSpec) -> LeaseAnswer:
        key = secrets.token_hex(16)
        try:
            return await self._api.create(CreateRequest(spec), key, LeaseAnswer)
        except (SandboxBusyError, CapabilityError):
            raise
        except BaseException:
            # Given up half way: the server may have made it all the same.
            self._run(self._farewell(f"/creations/{key}"))
            raise

    async def _farewell(self, path: str) -> None:
        try:
            await self._api.delete(path, repeat_s=_FAREWELL_S)
        except SandboxError as error:
            _LOG.warning("%s", error)

    async def _beat(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            named = HeartbeatRequest(list(self._live), list(self._snapshots))
            try:
                answer = await self._api.post("/heartbeat", named, HeartbeatAnswer, timeout_s=every_s)
            except SandboxError as error:
                _LOG.warning("%s", error)
                continue
            for sandbox_id, why in answer.gone.items():
                if sandbox := self._live.pop(sandbox_id, None):
                    self._run(sandbox.lost(why))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)
