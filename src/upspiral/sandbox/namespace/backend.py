"""NamespaceBackend: sandboxes of Linux namespaces, which a keeper forks; this process talks to the agent of each."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from upspiral.errors import SandboxError, SandboxGoneError
from upspiral.sandbox.base import HOST_IMAGE, Capabilities, SandboxSpec, Snapshot
from upspiral.sandbox.connected import settings_for
from upspiral.sandbox.connection import Connection
from upspiral.sandbox.egress import EgressLog, EgressRecord, way_out
from upspiral.sandbox.host_paths import check_host_paths
from upspiral.sandbox.images import ImageStore, UsedImage
from upspiral.sandbox.namespace.host import check_host, explain
from upspiral.sandbox.namespace.keeper.order import AGENT_ID, Order
from upspiral.sandbox.namespace.keeper_process import KeeperProcess, Message
from upspiral.sandbox.namespace.leftovers import KIND, remove_groups, sweep
from upspiral.sandbox.namespace.sandbox import Making, NamespaceSandbox, Origin
from upspiral.sandbox.open_files import allow_many, enough_for_a_sandbox
from upspiral.sandbox.owner import Owner, make_folder, remove_tree

_CREATE_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_MAX_STARTING = 16
"""At a time. More would only wait for the same cores."""
_MIB = 1 << 20
_LIFETIME_GRACE_S = 5.0
"""The keeper ends a sandbox so much later than this process should have done it."""
_OWN_PROCESSES = 2
"""Of the agent's, which count to the same limit."""


class NamespaceBackend:
    """Satisfies SandboxBackend. Makes one folder below `root` (default: in memory, /dev/shm), and control groups below
    `control_group` (default: the one that this process is in) where it may. `images` is by default this user's store,
    and `egress_log` hears of connections that sandboxes make.

    Raises SandboxError when namespaces are not to be had, with the cause and what to do. Its keeper is started anew
    should it die, without the snapshots that it held.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        control_group: str | None = None,
        images: ImageStore | None = None,
        egress_log: Callable[[EgressRecord], None] | None = None,
    ):
        check_host()
        allow_many()
        self._root = root
        self._control_group = control_group
        self._images = images
        self._egress_log = egress_log or EgressLog()
        self._names = itertools.count(1)
        self._live: dict[str, NamespaceSandbox] = {}
        self._beginning: dict[str, SandboxError | None] = {}
        """Those that are being made, and how they ended before that was done."""
        self._origins: dict[str, Origin] = {}
        self._used_images: dict[str, UsedImage] = {}
        self._using = threading.Lock()
        self._starting = asyncio.Semaphore(_MAX_STARTING)
        self._stopping: asyncio.Future[None] | None = None
        self._keeper = self._start_keeper()

    def _start_keeper(self) -> KeeperProcess:
        sweep(self._root)
        label = Owner.this_process().label(KIND)
        self._folder = make_folder(self._root, label)
        try:
            keeper = KeeperProcess(label, self._folder, self._control_group, self._on_ended)
            try:
                keeper.try_out(asdict(_order("trial", SandboxSpec(), Origin(), grouped=False)))
            except BaseException:
                keeper.kill()
                raise
        except BaseException as error:
            self._folder.rmdir()
            remove_groups(label)
            if isinstance(error, SandboxError):
                raise SandboxError(explain(str(error))) from error
            raise
        return keeper

    @property
    def capabilities(self) -> Capabilities:
        grouped, layered = (self._keeper.abilities[name] for name in ("control_groups", "layers"))
        return Capabilities(
            isolation="namespace",
            untrusted=True,
            network_none=True,
            forward_sockets=True,
            egress=True,
            images=layered,
            mounts=True,
            memory_limit="sandbox" if grouped else "process",
            disk_quota=True,
            cpu_limit=grouped,
            snapshot=layered,
            shell_fork="replay" if layered else "none",
            connect=True,
        )

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[NamespaceSandbox]:
        self.capabilities.check(spec, backend="namespace")
        check_host_paths(spec)
        sandbox = await self._start(spec)
        try:
            await sandbox.lay_out(spec.files)
            yield sandbox
        finally:
            await asyncio.shield(sandbox.stop())

    async def drop(self, snapshot: Snapshot) -> None:
        if self._origins.pop(snapshot.id, None) is not None and not self._keeper.is_dead:
            await self.ask("drop", timeout_s=_STOP_TIMEOUT_S, snapshot=snapshot.id)

    async def stop(self) -> None:
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._close())
        await asyncio.shield(self._stopping)

    async def _close(self) -> None:
        try:
            await asyncio.gather(*(sandbox.stop() for sandbox in list(self._live.values())))
        finally:
            self._keeper.close()
            await asyncio.to_thread(self._keeper.wait)
            self._bury()
            await asyncio.to_thread(self._release_images)

    async def start_all(self, snapshot: Snapshot, spec: SandboxSpec, count: int) -> Sequence[NamespaceSandbox]:
        """Sandboxes on a snapshot, which is dropped: all, or none and the error of one."""
        spec = replace(spec, image=snapshot)
        starts = [asyncio.ensure_future(self._start(spec)) for _ in range(count)]
        try:
            sandboxes = await asyncio.gather(*starts)
            await self.drop(snapshot)
            return sandboxes
        except BaseException:
            await asyncio.shield(self._give_up(starts, snapshot))
            raise

    async def _give_up(self, starts: Sequence[asyncio.Future[NamespaceSandbox]], snapshot: Snapshot) -> None:
        started = await asyncio.gather(*starts, return_exceptions=True)
        await asyncio.gather(*(each.stop() for each in started if isinstance(each, NamespaceSandbox)))
        await self.drop(snapshot)

    async def _start(self, spec: SandboxSpec) -> NamespaceSandbox:
        async with self._starting, contextlib.AsyncExitStack() as exits:
            with enough_for_a_sandbox():
                self._revive()
                origin = await self._origin_of(spec.image)
                furnished = await exits.enter_async_context(way_out(spec, self._folder, self._egress_log))
                name = f"sandbox-{next(self._names)}-{secrets.token_hex(4)}"
                order = self.order(name, furnished, origin)
                here, there = socket.socketpair()
            self._beginning[name] = None
            try:
                with there:
                    await self.ask(
                        "create", timeout_s=_CREATE_TIMEOUT_S, descriptors=[there.fileno()], order=asdict(order)
                    )
                connection = await Connection.over(here, forward=furnished.forward_sockets)
            except BaseException:
                here.close()  # which ends the sandbox, should it have come to life all the same
                raise
            finally:
                ended = self._beginning.pop(name)
            sandbox = NamespaceSandbox(self, name, Making(spec, furnished, origin, exits.pop_all()), connection)
            self._live[name] = sandbox
            if ended is not None:
                sandbox.lose(ended)
            return sandbox

    def order(self, name: str, spec: SandboxSpec, origin: Origin) -> Order:
        return _order(name, spec, origin, grouped=self.capabilities.memory_limit == "sandbox")

    async def ask(self, do: str, *, timeout_s: float, **said: Any) -> Message:
        """Of the keeper; see there."""
        return await self._keeper.ask(do, timeout_s=timeout_s, **said)

    async def end(self, sandbox: NamespaceSandbox) -> None:
        """Returns when nothing is left of it."""
        self._live.pop(sandbox.id, None)
        keeper = self._keeper  # another one may have followed when this one's death is heard of here
        try:
            await keeper.ask("stop", timeout_s=_STOP_TIMEOUT_S, name=sandbox.id)
        except SandboxError:
            # It is dead, or hangs; then it can help nobody, and its death takes all sandboxes with it.
            keeper.kill()

    def remember(self, snapshot: Snapshot, origin: Origin) -> None:
        self._origins[snapshot.id] = origin

    def origin_of(self, snapshot: Snapshot) -> Origin:
        origin = self._origins.get(snapshot.id)
        if origin is None:
            raise SandboxError(f"there is no {snapshot.id} here; it was dropped, or belongs to another backend")
        return origin

    async def _origin_of(self, image: str | Snapshot) -> Origin:
        if isinstance(image, Snapshot):
            return self.origin_of(image)
        if image == HOST_IMAGE:
            return Origin()
        used = await asyncio.to_thread(self._use_image, image)
        return Origin([str(folder) for folder in used.lowers], used.env, used.workdir)

    def _use_image(self, name: str) -> UsedImage:
        """What a name means may change; what was used is there until this backend stops. Threads take turns, since a
        second hold of the same image would have nobody to release it, nor would one that comes after the end."""
        with self._using:
            self._check_open()
            self._images = self._images or ImageStore()
            digest = self._images.image(name).digest
            if digest not in self._used_images:
                self._used_images[digest] = self._images.use(digest)
            return self._used_images[digest]

    def _release_images(self) -> None:
        with self._using:
            for image in self._used_images.values():
                image.release()

    def _on_ended(self, name: str, problem: str, is_over: bool) -> None:
        kind = SandboxGoneError if is_over else SandboxError
        error = kind(f"the sandbox has ended: {problem or 'its agent is gone'}")
        if (sandbox := self._live.get(name)) is not None:
            sandbox.lose(error)
        elif name in self._beginning:
            self._beginning[name] = error

    def _check_open(self) -> None:
        if self._stopping is not None:
            raise SandboxGoneError("the sandbox backend was stopped")

    def _revive(self) -> None:
        self._check_open()
        if self._keeper.is_dead:
            self._bury()
            self._origins.clear()
            self._keeper = self._start_keeper()

    def _bury(self) -> None:
        self._keeper.kill()
        remove_groups(self._folder.name)
        remove_tree(self._folder)


def _order(name: str, spec: SandboxSpec, origin: Origin, *, grouped: bool) -> Order:
    limits, settings = spec.limits, settings_for(spec, origin.workdir)
    elsewhere = {"CORE", "AS", "DATA"} if grouped else {"CORE"}
    rlimits = {kind: value for kind, value in settings.rlimits.items() if kind not in elsewhere}
    rlimits["NPROC"] = limits.processes + _OWN_PROCESSES
    settings = replace(settings, env={**settings.env, **origin.env, **spec.env}, rlimits=rlimits, is_init=True)
    return Order(
        name=name,
        user=0 if origin.layers else AGENT_ID,
        layers=origin.layers,
        snapshot=spec.image.id if isinstance(spec.image, Snapshot) else None,
        mounts={inside: os.path.realpath(path) for path, inside in spec.mounts.items()},
        disk_bytes=limits.disk_mb * _MIB,
        inodes=limits.inodes,
        # What is written counts to memory, too. So that a full disk is a full disk, and not a lack of memory, half of
        # the memory is there for processes whatever the disk is.
        memory_bytes=max(limits.memory_mb, limits.disk_mb + limits.memory_mb // 2) * _MIB,
        processes=limits.processes + _OWN_PROCESSES,
        cpus=limits.cpus,
        lifetime_s=limits.lifetime_s + _LIFETIME_GRACE_S,
        agent=settings.to_json(),
    )
