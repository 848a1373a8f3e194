"""A sandbox in a container: what its agent cannot do alone the engine does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

from upspiral.errors import SandboxError, SandboxGoneError
from upspiral.sandbox.base import SandboxSpec, Snapshot
from upspiral.sandbox.connected import ConnectedSandbox
from upspiral.sandbox.connection import Connection
from upspiral.sandbox.container.order import Origin


@dataclass(frozen=True, slots=True)
class Container:
    """One that runs, and the line to its agent."""

    name: str
    origin: Origin
    connection: Connection


@dataclass(frozen=True, slots=True)
class Making:
    """How a sandbox came about."""

    spec: SandboxSpec
    """As it was asked for; a fork is asked for with the same."""
    furnished: SandboxSpec
    """With the way out that `spec` allows."""
    exits: AsyncExitStack
    """To be closed after its end."""


class Maker(Protocol):
    """What a sandbox needs of the backend that made it."""

    async def commit(self, container: Container) -> Snapshot: ...

    async def run_on(self, snapshot: Snapshot, spec: SandboxSpec) -> Container: ...

    async def remove(self, container: str) -> None: ...

    async def start_all(self, snapshot: Snapshot, spec: SandboxSpec, count: int) -> Sequence[ContainerSandbox]: ...

    async def drop(self, snapshot: Snapshot) -> None: ...

    async def end(self, sandbox: ContainerSandbox) -> None: ...


class ContainerSandbox(ConnectedSandbox):
    """Its id is its first container's name; `restore` puts another container in the place of that."""

    def __init__(self, maker: Maker, making: Making, container: Container):
        super().__init__(container.name, container.connection, making.spec.limits)
        self._maker = maker
        self._making = making
        self.container = container
        self._turn = asyncio.Lock()

    async def snapshot(self) -> Snapshot:
        """Everything inside stands still for as long as it takes to copy what was written."""
        async with self._turn:
            self._check_live()
            return await self._maker.commit(self.container)

    async def fork(self, count: int = 1) -> Sequence[ContainerSandbox]:
        snapshot = await self.snapshot()
        try:
            return await self._maker.start_all(snapshot, self._making.spec, count)
        finally:
            await self._maker.drop(snapshot)

    async def restore(self, snapshot: Snapshot) -> None:
        async with self._turn:
            self._check_live()
            following = await self._maker.run_on(snapshot, self._making.furnished)
            if self._stopping:
                following.connection.lose(SandboxGoneError("the sandbox was stopped"))
                await self._maker.remove(following.name)
                self._check_live()
            former, self.container = self.container, following
            self._connection = following.connection
            former.connection.lose(SandboxError("the sandbox was put back to a snapshot while this went on"))
            await self._maker.remove(former.name)

    async def _dispose(self) -> None:
        try:
            await self._maker.end(self)
        finally:
            await self._making.exits.aclose()
