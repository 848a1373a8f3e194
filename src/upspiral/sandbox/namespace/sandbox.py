"""A sandbox of the namespace backend: what its agent cannot do alone the keeper does."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, Protocol, TypeVar

from upspiral.errors import SandboxError
from upspiral.sandbox.base import WORKSPACE, Diff, SandboxSpec, Snapshot
from upspiral.sandbox.connected import ConnectedSandbox
from upspiral.sandbox.connection import Connection
from upspiral.sandbox.namespace.keeper.order import Order
from upspiral.sandbox.open_files import enough_for_a_sandbox

T = TypeVar("T")
COPY_TIMEOUT_S = 150.0
"""Of what may have to copy or read all that a sandbox has written."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a sandbox or a snapshot was made of in the first place."""

    layers: Sequence[str] = ()
    """Folders, top first; none: the machine's own programs."""
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = WORKSPACE


@dataclass(frozen=True, slots=True)
class Making:
    """How a sandbox came about."""

    spec: SandboxSpec
    """As it was asked for; a fork is asked for with the same."""
    furnished: SandboxSpec
    """With the way out that `spec` allows."""
    origin: Origin
    exits: AsyncExitStack
    """To be closed after its end."""


class Maker(Protocol):
    """What a sandbox needs of the backend that made it."""

    async def ask(self, do: str, *, timeout_s: float, **said: Any) -> Mapping[str, Any]:
        """Of the keeper."""
        ...

    def order(self, name: str, spec: SandboxSpec, origin: Origin) -> Order:
        """What the keeper is told of a sandbox."""
        ...

    def remember(self, snapshot: Snapshot, origin: Origin) -> None: ...

    def origin_of(self, snapshot: Snapshot) -> Origin: ...

    async def start_all(self, snapshot: Snapshot, spec: SandboxSpec, count: int) -> Sequence[NamespaceSandbox]: ...

    async def drop(self, snapshot: Snapshot) -> None: ...

    async def end(self, sandbox: NamespaceSandbox) -> None: ...


class NamespaceSandbox(ConnectedSandbox):
    """Satisfies Sandbox."""

    def __init__(self, maker: Maker, name: str, making: Making, connection: Connection):
        super().__init__(name, connection, making.spec.limits)
        self._making = making
        self._origin = making.origin
        self._maker = maker
        self._turn = asyncio.Lock()
        self._unwanted: set[asyncio.Future[None]] = set()

    async def diff(self) -> Diff:
        """Since its image, whatever snapshots lie between. Everything inside stands still for as long as it takes."""
        async with self._turn:
            self._check_live()
            with _memory_file() as archive, _memory_file() as removed:
                descriptors = [archive.fileno(), removed.fileno()]
                said = await self._maker.ask("diff", timeout_s=COPY_TIMEOUT_S, descriptors=descriptors, name=self.id)
                if "larger_than" in said:
                    raise OSError(f"the difference is larger than {said['larger_than']} bytes")
                return await asyncio.to_thread(lambda: Diff(_content(archive), json.loads(_content(removed))))

    async def snapshot(self) -> Snapshot:
        """Sealed when no operation is under way and nothing runs inside; it then goes on above the sealed layer.
        Cancelled, it is taken all the same, since the keeper may be amid it, and dropped."""
        taking = asyncio.ensure_future(self._take_snapshot())
        return await self._unless_given_up(taking, asyncio.shield(taking))

    async def _unless_given_up(self, taking: asyncio.Future[Snapshot], wanted: Awaitable[T]) -> T:
        try:
            return await wanted
        except asyncio.CancelledError:
            self._unwanted.add(dropping := asyncio.ensure_future(self._drop_unwanted(taking)))
            dropping.add_done_callback(self._unwanted.discard)
            raise

    async def _drop_unwanted(self, taking: asyncio.Future[Snapshot]) -> None:
        with suppress(SandboxError):
            await self._maker.drop(await taking)

    async def _take_snapshot(self, sealed: asyncio.Future[Snapshot] | None = None) -> Snapshot:
        """`sealed` has it when it can be stood on, should that be while this sandbox still waits for its new agent."""
        snapshot = Snapshot(f"snapshot-{secrets.token_hex(8)}", "sealed")

        def when_sealed() -> None:
            if sealed is not None and not sealed.done():
                self._maker.remember(snapshot, self._origin)
                sealed.set_result(snapshot)

        async with self._turn:
            self._check_live()
            with self._held_if_idle() as idle:
                said = await self._maker.ask(
                    "snapshot",
                    timeout_s=COPY_TIMEOUT_S,
                    when_sealed=when_sealed,
                    name=self.id,
                    snapshot=snapshot.id,
                    may_seal=idle,
                )
            if sealed is None or not sealed.done():
                snapshot = Snapshot(snapshot.id, said["how"])
                self._maker.remember(snapshot, self._origin)
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
        shells, sealed = self.shells_to_inherit(), asyncio.get_running_loop().create_future()
        taking = asyncio.ensure_future(self._take_snapshot(sealed))
        taking.add_done_callback(lambda taken: taken.cancelled() or taken.exception())  # it may be nobody's any more
        either = asyncio.wait([sealed, taking], return_when=asyncio.FIRST_COMPLETED)
        await self._unless_given_up(taking, either)
        snapshot = taking.result() if taking.done() else sealed.result()
        # They start while this sandbox waits for its new agent.
        forks = await self._maker.start_all(snapshot, self._making.spec, count)
        try:
            await asyncio.shield(taking)
        except BaseException:
            await asyncio.shield(asyncio.gather(*(fork.stop() for fork in forks)))
            raise
        for fork in forks:
            fork.inherit_shells(shells)
        return forks

    async def restore(self, snapshot: Snapshot) -> None:
        async with self._turn:
            self._check_live()
            origin = self._maker.origin_of(snapshot)
            order = self._maker.order(self.id, self._making.furnished, origin)
            with enough_for_a_sandbox():
                here, there = socket.socketpair()
            with there:
                following = await self._connect(here)
                lost, self._connection, self._origin = self._connection, following, origin
                self.inherit_shells(())
                try:
                    await self._maker.ask(
                        "restore",
                        timeout_s=COPY_TIMEOUT_S,
                        descriptors=[there.fileno()],
                        name=self.id,
                        snapshot=snapshot.id,
                        order=asdict(order),
                    )
                except SandboxError as error:
                    following.lose(SandboxError(f"the sandbox is lost: {error}"))
                    raise
                finally:
                    lost.lose(SandboxError("the sandbox was put back to a snapshot while this went on"))

    async def _connect(self, connected: socket.socket) -> Connection:
        return await Connection.over(connected, forward=self._making.furnished.forward_sockets)

    def lose(self, error: SandboxError) -> None:
        """It has ended without being asked to."""
        self._connection.lose(error)

    async def _dispose(self) -> None:
        try:
            await self._maker.end(self)
        finally:
            await self._making.exits.aclose()


def _memory_file() -> BinaryIO:
    with enough_for_a_sandbox():
        return os.fdopen(os.memfd_create("difference", os.MFD_CLOEXEC), "r+b")


def _content(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()
