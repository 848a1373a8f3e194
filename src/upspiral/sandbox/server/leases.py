"""All sandboxes of a server and whose they are."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from upspiral.errors import RequestError, SandboxBusyError, SandboxGoneError
from upspiral.sandbox.base import Sandbox, SandboxSpec, Snapshot
from upspiral.sandbox.pool import Pool
from upspiral.sandbox.pool.queue import TENANT_LABEL
from upspiral.sandbox.server.lease import DELETED, Lease
from upspiral.sandbox.server.snapshots import Snapshots
from upspiral.sandbox.server.tenants import Tenant, Usage, memory_of

_MOST_REMEMBERED = 10_000
"""Ended leases, and creations that are over, of which one can still learn what became of them."""
_DRAIN_RETRY_S = 10.0
_STOP_S = 25.0
"""How long a client is kept waiting for the end of its sandbox."""


class UnknownSandboxError(RequestError):
    """The tenant has no such sandbox. Those of others look the same."""

    status = 404
    code = "unknown_sandbox"


class KeyReusedError(RequestError):
    """The idempotency key stands for another request."""

    status = 409
    code = "key_reused"


@dataclass(eq=False, slots=True)
class _Creation:
    """What was asked for under an idempotency key."""

    asked: bytes
    """Tells one spec from another; empty when it was cancelled before it was asked for."""
    lease: asyncio.Future[Lease]
    """The error, once that has ended."""
    holder: asyncio.Task[None] | None = None


class Leases:
    """Makes leases out of a pool's sandboxes, finds them for their tenants only, and ends them.

    Each lease has a task that holds the sandbox's context open; the lease's end closes it, whatever the cause.
    """

    def __init__(self, pool: Pool, *, heartbeat_s: float) -> None:
        self.heartbeat_s = heartbeat_s
        self.snapshots = Snapshots(pool, heartbeat_s=heartbeat_s)
        self._pool = pool
        self._usage = Usage()
        self._live: dict[str, Lease] = {}
        self._over: OrderedDict[str, tuple[str, str]] = OrderedDict()
        """Of ended leases: tenant and why."""
        self._creations: OrderedDict[tuple[str, str], _Creation] = OrderedDict()
        """By tenant and idempotency key."""
        self._holders: set[asyncio.Task[None]] = set()
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._live)

    def of(self, tenant: Tenant) -> Sequence[Lease]:
        return [lease for lease in self._live.values() if lease.tenant.name == tenant.name]

    def find(self, tenant: Tenant, lease_id: str) -> Lease:
        """Raises UnknownSandboxError, or SandboxGoneError for one that the tenant had. Counts as a heartbeat."""
        lease = self._live.get(lease_id)
        if lease is not None and lease.tenant.name == tenant.name:
            lease.check()
            lease.seen()
            return lease
        owner, why = self._over.get(lease_id, ("", ""))
        if owner == tenant.name:
            raise SandboxGoneError(f"sandbox {lease_id} is gone: {why}")
        raise UnknownSandboxError(f"{tenant.name} has no sandbox {lease_id[:80]!r}")

    def heartbeat(self, tenant: Tenant, lease_ids: Sequence[str], snapshot_ids: Sequence[str]) -> dict[str, str]:
        """Keeps the tenant's leases and snapshots alive. Returns why leases are gone that are, by id."""
        gone: dict[str, str] = {}
        for lease_id in lease_ids:
            try:
                self.find(tenant, lease_id)
            except (UnknownSandboxError, SandboxGoneError) as error:
                gone[lease_id] = str(error)
        for snapshot_id in snapshot_ids:
            self.snapshots.seen(tenant, snapshot_id)
        return gone

    async def create(self, tenant: Tenant, key: str, spec: SandboxSpec) -> Lease:
        """The same lease for the same key. The creation goes on when whoever asked has gone: it may ask again."""
        creation = self._creations.get((tenant.name, key))
        if creation is None:
            if self.is_draining:
                raise SandboxBusyError("the server is being drained; use another one", retry_after_s=_DRAIN_RETRY_S)
            tenant.check(spec)
            resolved = self.snapshots.resolve(tenant, spec)
            creation = self._remember(tenant, key, _fingerprint(spec))
            creation.holder = self._run(self._hold(tenant, key, resolved, creation))
        elif creation.asked not in (b"", _fingerprint(spec)):
            raise KeyReusedError("this Idempotency-Key was used for another sandbox; take a new one for each")
        lease = await asyncio.shield(creation.lease)
        lease.check()
        return lease

    async def end(self, lease: Lease, why: str) -> None:
        """Returns when nothing of the sandbox is left, or after a while all the same: its end goes on by itself."""
        lease.end(why)
        with suppress(TimeoutError):
            async with asyncio.timeout(_STOP_S):
                await lease.stopped.wait()

    async def cancel_creation(self, tenant: Tenant, key: str) -> None:
        """Nothing is made, or stays, of what was or will be asked for under this key."""
        creation = self._creations.get((tenant.name, key)) or self._remember(tenant, key, b"")
        if not creation.lease.done():
            _refuse(creation.lease, SandboxGoneError("the creation was cancelled by its client"))
            if creation.holder is not None:
                creation.holder.cancel()
        elif creation.lease.exception() is None:
            await self.end(creation.lease.result(), DELETED)

    async def fork(self, lease: Lease, count: int) -> Sequence[Lease]:
        """Leases like this one, of sandboxes with the same files."""
        if self.is_draining:
            raise SandboxBusyError("the server is being drained; nothing is forked", retry_after_s=_DRAIN_RETRY_S)
        memory_mb = memory_of(lease.spec.limits)
        self._usage.take(lease.tenant, memory_mb, count)
        children: Sequence[Sandbox] = ()
        try:
            children = await lease.sandbox.fork(count)
        finally:
            for _ in range(count - len(children)):
                self._usage.give_back(lease.tenant, memory_mb)
        leases = [self._lease(lease.tenant, lease.spec, child) for child in children]
        for each in leases:
            self._run(self._hold_fork(each))
        return leases

    async def snapshot(self, lease: Lease) -> Snapshot:
        with self.snapshots.room(lease.tenant):
            snapshot = await lease.sandbox.snapshot()
            self.snapshots.add(lease.tenant, snapshot)
        return snapshot

    async def drain(self, *, timeout_s: float) -> None:
        """Makes no more, waits until all have ended, but no longer than `timeout_s`, and ends the others."""
        self.is_draining = True
        for creation in self._creations.values():
            if creation.holder is not None and not creation.lease.done():
                _refuse(creation.lease, SandboxBusyError("the server is being drained", retry_after_s=_DRAIN_RETRY_S))
                creation.holder.cancel()
        if self._holders:
            await asyncio.wait(self._holders, timeout=timeout_s)
        for lease in list(self._live.values()):
            lease.end("its server was stopped")
        await asyncio.gather(*self._holders, return_exceptions=True)
        await self.snapshots.stop()

    # What holds the sandboxes

    async def _hold(self, tenant: Tenant, key: str, spec: SandboxSpec, creation: _Creation) -> None:
        labels = {**spec.labels, TENANT_LABEL: tenant.name}
        memory_mb = memory_of(spec.limits)
        lease: Lease | None = None
        try:
            self._usage.take(tenant, memory_mb)
            try:
                async with self._pool.acquire(replace(spec, labels=labels)) as sandbox:
                    # They are in the sandbox. Thousands of these may be here, for hours.
                    spec = replace(spec, files={})
                    lease = self._lease(tenant, spec, sandbox)
                    async with self._listed(lease):
                        if not creation.lease.done():
                            creation.lease.set_result(lease)
                        await lease.until_over()
            finally:
                self._usage.give_back(tenant, memory_mb)
                if lease is not None:
                    lease.stopped.set()
                    creation.lease = _refused(SandboxGoneError(f"sandbox {lease.id} is gone: {lease.why_over}"))
        except Exception as error:
            # Whatever it was, whoever waits is told; the next try with this key is a new one.
            if creation.lease.done():
                raise
            self._creations.pop((tenant.name, key), None)
            _refuse(creation.lease, error)

    async def _hold_fork(self, lease: Lease) -> None:
        try:
            async with self._listed(lease):
                await lease.until_over()
        finally:
            try:
                await lease.sandbox.stop()
            finally:
                self._usage.give_back(lease.tenant, memory_of(lease.spec.limits))
                lease.stopped.set()

    def _lease(self, tenant: Tenant, spec: SandboxSpec, sandbox: Sandbox) -> Lease:
        return Lease(tenant, spec, sandbox, self.heartbeat_s, self._pool.metrics.exec_s.observe)

    @asynccontextmanager
    async def _listed(self, lease: Lease) -> AsyncIterator[None]:
        self._live[lease.id] = lease
        try:
            yield
        finally:
            lease.end("its server was stopped")
            del self._live[lease.id]
            self._over[lease.id] = (lease.tenant.name, lease.why_over)
            if len(self._over) > _MOST_REMEMBERED:
                self._over.popitem(last=False)
            await lease.operations.stop()

    def _remember(self, tenant: Tenant, key: str, asked: bytes) -> _Creation:
        creation = _Creation(asked, asyncio.get_running_loop().create_future())
        self._creations[tenant.name, key] = creation
        if len(self._creations) > _MOST_REMEMBERED:
            oldest = next(iter(self._creations))
            holder = self._creations[oldest].holder
            if holder is None or holder.done():
                del self._creations[oldest]
            else:
                self._creations.move_to_end(oldest)
        return creation

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._holders.add(task)
        task.add_done_callback(self._holders.discard)
        return task


def _fingerprint(spec: SandboxSpec) -> bytes:
    """In place of the spec, whose files may be large: so many are remembered."""
    return hashlib.sha256(msgspec.json.encode(spec, order="deterministic")).digest()


def _refused(error: Exception) -> asyncio.Future[Lease]:
    lease: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
    _refuse(lease, error)
    return lease


def _refuse(lease: asyncio.Future[Lease], error: Exception) -> None:
    lease.set_exception(error)
    # Whoever asked may be gone; that is no error of this process.
    lease.exception()
