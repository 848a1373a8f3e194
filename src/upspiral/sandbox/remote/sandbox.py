"""One sandbox on a server, in the hands of this process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from upspiral.errors import SandboxGoneError
from upspiral.sandbox.base import Diff, Limits, Snapshot
from upspiral.sandbox.connected import ConnectedSandbox
from upspiral.sandbox.connection import Connection
from upspiral.sandbox.remote.api import FORK_S, SNAPSHOT_S, Api
from upspiral.sandbox.remote.line import Line
from upspiral.sandbox.server.wire import DiffAnswer, ForkRequest, LeaseAnswer, LeasesAnswer, RestoreRequest


class Holder(Protocol):
    """What keeps sandboxes and snapshots alive by heartbeats."""

    @property
    def patience_s(self) -> float: ...

    def adopt(self, lease: LeaseAnswer, limits: Limits) -> RemoteSandbox: ...

    def adopt_snapshot(self, snapshot: Snapshot) -> None: ...

    async def let_go(self, sandbox: RemoteSandbox) -> None: ...


class RemoteSandbox(ConnectedSandbox):
    """What happens inside goes by frames, straight to the sandbox's agent; the rest is asked of the server."""

    def __init__(self, api: Api, holder: Holder, lease: LeaseAnswer, limits: Limits) -> None:
        connection = Connection()
        Line(api, lease.id, connection, patience_s=holder.patience_s)
        super().__init__(lease.id, connection, limits)
        self._api = api
        self._holder = holder

    async def lost(self, why: str) -> None:
        """The server has given it up."""
        await self._end(SandboxGoneError(why))

    async def diff(self) -> Diff:
        told = await self._api.post(f"/sandboxes/{self.id}/diff", None, DiffAnswer, timeout_s=SNAPSHOT_S)
        return Diff(told.archive, [os.fsdecode(path) for path in told.removed])

    async def snapshot(self) -> Snapshot:
        snapshot = await self._api.post(f"/sandboxes/{self.id}/snapshot", None, Snapshot, timeout_s=SNAPSHOT_S)
        self._holder.adopt_snapshot(snapshot)
        return snapshot

    async def fork(self, count: int = 1) -> Sequence[RemoteSandbox]:
        path, shells = f"/sandboxes/{self.id}/fork", self.shells_to_inherit()
        answer = await self._api.post(path, ForkRequest(count), LeasesAnswer, timeout_s=FORK_S)
        forks = [self._holder.adopt(lease, self._limits) for lease in answer.sandboxes]
        for fork in forks:
            fork.inherit_shells(shells)
        return forks

    async def restore(self, snapshot: Snapshot) -> None:
        await self._api.post_for_nothing(f"/sandboxes/{self.id}/restore", RestoreRequest(snapshot.id), SNAPSHOT_S)
        self.inherit_shells(())

    async def _dispose(self) -> None:
        await self._holder.let_go(self)
