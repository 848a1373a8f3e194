"""Snapshots that a server keeps for its tenants."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from upspiral.errors import SandboxBusyError, SandboxGoneError
from upspiral.sandbox.base import SandboxBackend, SandboxSpec, Snapshot
from upspiral.sandbox.server.tenants import Tenant

_QUOTA_RETRY_S = 10.0


@dataclass(eq=False, slots=True)
class _Held:
    tenant: Tenant
    snapshot: Snapshot
    seen_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class Snapshots:
    """By id, for their tenants only. One that its client's heartbeats do not name for `heartbeat_s` is dropped."""

    def __init__(self, backend: SandboxBackend, *, heartbeat_s: float) -> None:
        self._backend = backend
        self._heartbeat_s = heartbeat_s
        self._held: dict[str, _Held] = {}
        self._taking: Counter[str] = Counter()
        """Snapshots that are being taken, by tenant."""
        self._expiries: set[asyncio.Task[Any]] = set()

    @contextmanager
    def room(self, tenant: Tenant) -> Iterator[None]:
        """Meanwhile there is room to `add` one. Raises SandboxBusyError when the tenant has as many as it may."""
        count = sum(held.tenant.name == tenant.name for held in self._held.values()) + self._taking[tenant.name]
        if count >= tenant.quota.snapshots:
            raise SandboxBusyError(
                f"{tenant.name} has {count} of {tenant.quota.snapshots} snapshots; drop some first",
                retry_after_s=_QUOTA_RETRY_S,
            )
        self._taking[tenant.name] += 1
        try:
            yield
        finally:
            self._taking[tenant.name] -= 1

    def add(self, tenant: Tenant, snapshot: Snapshot) -> None:
        held = self._held[snapshot.id] = _Held(tenant, snapshot)
        task = asyncio.create_task(self._expire(held))
        self._expiries.add(task)
        task.add_done_callback(self._expiries.discard)

    def find(self, tenant: Tenant, snapshot_id: str) -> Snapshot:
        """Raises SandboxGoneError when the tenant has none of this id, whoever else has."""
        held = self._held.get(snapshot_id)
        if held is None or held.tenant.name != tenant.name:
            raise SandboxGoneError(f"{tenant.name} has no snapshot {snapshot_id[:80]!r}; it may have been dropped")
        self.seen(tenant, snapshot_id)
        return held.snapshot

    def resolve(self, tenant: Tenant, spec: SandboxSpec) -> SandboxSpec:
        """With the tenant's own snapshot as image, if it asks for one."""
        if not isinstance(spec.image, Snapshot):
            return spec
        return replace(spec, image=self.find(tenant, spec.image.id))

    def seen(self, tenant: Tenant, snapshot_id: str) -> None:
        held = self._held.get(snapshot_id)
        if held is not None and held.tenant.name == tenant.name:
            held.seen_at = asyncio.get_running_loop().time()

    async def drop(self, tenant: Tenant, snapshot_id: str) -> None:
        """Does nothing when it is gone already."""
        held = self._held.get(snapshot_id)
        if held is not None and held.tenant.name == tenant.name:
            del self._held[snapshot_id]
            await self._backend.drop(held.snapshot)

    async def stop(self) -> None:
        for task in self._expiries:
            task.cancel()
        await asyncio.gather(*self._expiries, return_exceptions=True)

    async def _expire(self, held: _Held) -> None:
        while self._held.get(held.snapshot.id) is held:
            silent_s = asyncio.get_running_loop().time() - held.seen_at
            if silent_s >= self._heartbeat_s:
                await self.drop(held.tenant, held.snapshot.id)
            else:
                await asyncio.sleep(self._heartbeat_s - silent_s)
