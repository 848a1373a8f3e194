"""A sandbox of the namespace backend: what its agent cannot do alone the keeper does."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from upspiral.errors import SandboxError, SandboxGoneError
from upspiral.sandbox.base import Diff, SandboxSpec, Snapshot
from upspiral.sandbox.connected import ConnectedSandbox, ConnectedShell
from upspiral.sandbox.connection import Connection

if TYPE_CHECKING:
    from upspiral.sandbox.namespace.backend import NamespaceBackend, Origin

COPY_TIMEOUT_S = 150.0
"""Of what may have to copy or read all that a sandbox has written."""
_REPLAY_TIMEOUT_S = 60.0


class NamespaceSandbox(ConnectedSandbox):
    """Its shells, should it be forked, are remembered as long as they are open."""

    def __init__(self, backend: NamespaceBackend, name: str, spec: SandboxSpec, origin: Origin, connection: Connection):
        super().__init__(name, connection, spec.limits)
        self.spec = spec
        self.origin = origin
        self.inherited: list[Sequence[str]] = []
        """The commands of shells that `shell` gives out first."""
        self._backend = backend
        self._turn = asyncio.Lock()
        self._shells: list[ConnectedShell] = []

    async def shell(self) -> ConnectedShell:
        """In a fork first one for each that was open, in the order in which these were opened: the commands that had
        been run in it are run again, on the files that the fork began with."""
        shell = await super().shell()
        if self.inherited:
            commands = self.inherited.pop(0)
            for command in commands:
                await shell.run(command, timeout_s=_REPLAY_TIMEOUT_S)
            shell.restored = "replayed"
        self._shells.append(shell)
        return shell

    async def diff(self) -> Diff:
        """Since its image, whatever snapshots lie between. Everything inside stands still for as long as it takes."""
        async with self._turn:
            self._check_live()
            with _memory_file() as archive, _memory_file() as removed:
                descriptors = [archive.fileno(), removed.fileno()]
                await self._backend.ask("diff", timeout_s=COPY_TIMEOUT_S, descriptors=descriptors, name=self.id)
                return await asyncio.to_thread(lambda: Diff(_content(archive), json.loads(_content(removed))))

    async def snapshot(self) -> Snapshot:
        """Sealed when no operation is under way and nothing runs inside; it then goes on above the sealed layer."""
        async with self._turn:
            self._check_live()
            name = f"snapshot-{secrets.token_hex(8)}"
            with self._held_if_idle() as idle:
                said = await self._backend.ask(
                    "snapshot", timeout_s=COPY_TIMEOUT_S, name=self.id, snapshot=name, may_seal=idle
                )
            snapshot = Snapshot(name, said["how"])
            self._backend.remember(snapshot, self.origin)
            return snapshot

    @contextmanager
    def _held_if_idle(self) -> Iterator[bool]:
        """Operations that others begin meanwhile wait for the agent that comes."""
        connection = self._connection
        if not connection.is_idle:
            yield False
            return
        connection.hold()
        try:
            yield True
        finally:
            connection.release()

    async def fork(self, count: int = 1) -> Sequence[NamespaceSandbox]:
        snapshot = await self.snapshot()
        try:
            forks = await self._backend.start_all(snapshot, self.spec, count)
        finally:
            await self._backend.drop(snapshot)
        for fork in forks:
            fork.inherited = [tuple(shell.commands) for shell in self._shells if shell.is_open]
        return forks

    async def restore(self, snapshot: Snapshot) -> None:
        async with self._turn:
            self._check_live()
            self.origin = self._backend.origin_of(snapshot)
            here, there = socket.socketpair()
            with there:
                following = await self._connect(here)
                lost, self._connection = self._connection, following
                self._shells.clear()
                self.inherited.clear()
                try:
                    await self._backend.ask(
                        "restore",
                        timeout_s=COPY_TIMEOUT_S,
                        descriptors=[there.fileno()],
                        name=self.id,
                        snapshot=snapshot.id,
                    )
                except SandboxError as error:
                    following.lose(SandboxError(f"the sandbox is lost: {error}"))
                    raise
                finally:
                    lost.lose(SandboxError("the sandbox was put back to a snapshot while this went on"))

    async def _connect(self, connected: socket.socket) -> Connection:
        return await Connection.over(connected, forward=self.spec.forward_sockets)

    def lose(self, problem: str, *, is_over: bool) -> None:
        """It has ended without being asked to; `is_over`: because its time was."""
        error = SandboxGoneError if is_over else SandboxError
        self._connection.lose(error(f"the sandbox has ended: {problem or 'its agent is gone'}"))

    def _check_live(self) -> None:
        if self._connection.error:
            raise type(self._connection.error)(*self._connection.error.args)

    async def _dispose(self) -> None:
        await self._backend.end(self)


def _memory_file() -> BinaryIO:
    return os.fdopen(os.memfd_create("difference", os.MFD_CLOEXEC), "r+b")


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()
