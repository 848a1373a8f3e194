"""DockerBackend and PodmanBackend: each sandbox is a container, which an engine's program starts and removes.

The engine is asked at the beginning and the end of a sandbox and for snapshots. Everything else goes over a socket to
the agent, which is the container's first process: it ends with that socket, and the engine then removes the container,
so that nothing is left of a host process that was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from upspiral.errors import CapabilityError, SandboxError, SandboxGoneError
from upspiral.sandbox.base import HOST_IMAGE, Capabilities, SandboxSpec, Snapshot
from upspiral.sandbox.connection import Connection
from upspiral.sandbox.container.doorway import Doorway
from upspiral.sandbox.container.engine import Engine, RefusedError
from upspiral.sandbox.container.images import Images
from upspiral.sandbox.container.leftovers import sweep
from upspiral.sandbox.container.order import Origin, agent_settings, check_mounts, run_arguments
from upspiral.sandbox.container.sandbox import Container, ContainerSandbox, Making
from upspiral.sandbox.egress import EgressLog, EgressRecord, way_out
from upspiral.sandbox.host_paths import check_host_paths
from upspiral.sandbox.owner import Owner, make_folder, remove_tree

_START_TIMEOUT_S = 60.0
_REMOVE_TIMEOUT_S = 60.0
_LOOK_AGAIN_S = 1.0
_MAX_STARTING = 8
"""At a time. More would only wait for the same cores."""
_NOT_FOUND = 127
_Made = TypeVar("_Made", ContainerSandbox, Container)


class ContainerBackend:
    """Satisfies SandboxBackend. Makes one folder for sockets below `root` (default: in memory, /dev/shm).

    Raises SandboxError when the engine cannot be reached. `egress_log` hears of connections that sandboxes make.
    """

    def __init__(
        self, engine: Engine, root: Path | None = None, *, egress_log: Callable[[EgressRecord], None] | None = None
    ):
        self._engine = engine
        self._abilities = engine.abilities()
        sweep(engine, root)
        self._label = Owner.this_process().label(engine.name)
        self._root = root
        self._folder: Path | None = None
        self._images = Images(engine, self._label)
        self._egress_log = egress_log or EgressLog()
        self._numbers = itertools.count(1)
        self._live: dict[str, ContainerSandbox] = {}
        self._starting = asyncio.Semaphore(_MAX_STARTING)
        self._starts: set[asyncio.Task[Any]] = set()
        self._stopped = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            isolation="container",
            untrusted=True,
            network_none=True,
            forward_sockets=True,
            egress=True,
            images=True,
            mounts=True,
            memory_limit="sandbox" if self._abilities.memory else "process",
            disk_quota=False,
            cpu_limit=self._abilities.cpus,
            snapshot=True,
            shell_fork="none",
            connect=True,
        )

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[ContainerSandbox]:
        self.capabilities.check(spec, backend=self._engine.name)
        check_host_paths(spec)
        check_mounts(spec)
        sandbox = await self._tracked(self._start(spec))
        try:
            await sandbox.lay_out(spec.files)
            yield sandbox
        finally:
            await asyncio.shield(sandbox.stop())

    async def drop(self, snapshot: Snapshot) -> None:
        await self._images.drop(snapshot)

    async def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        for start in self._starts:
            if not start.cancelling():  # a second one would cut short what the first one has it put away
                start.cancel()
        await asyncio.gather(*self._starts, return_exceptions=True)
        ended = await asyncio.gather(*(each.stop() for each in list(self._live.values())), return_exceptions=True)
        try:
            await self._images.remove_all()
        finally:
            if self._folder:
                await asyncio.to_thread(remove_tree, self._folder)
        for problem in ended:
            if isinstance(problem, BaseException):
                raise problem

    async def commit(self, container: Container) -> Snapshot:
        return await self._images.commit(container.name, container.origin)

    async def start_all(self, snapshot: Snapshot, spec: SandboxSpec, count: int) -> Sequence[ContainerSandbox]:
        """Sandboxes on a snapshot: all, or none and the error of one."""
        spec = replace(spec, image=snapshot)
        starts = [asyncio.ensure_future(self._tracked(self._start(spec))) for _ in range(count)]
        try:
            return await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            started = await asyncio.gather(*starts, return_exceptions=True)
            await asyncio.gather(*(each.stop() for each in started if isinstance(each, ContainerSandbox)))
            raise

    async def run_on(self, snapshot: Snapshot, spec: SandboxSpec) -> Container:
        return await self._tracked(self._run(spec, self._images.origin_of_snapshot(snapshot)))

    async def _run(self, spec: SandboxSpec, origin: Origin) -> Container:
        """A container whose agent answers. Removed again when that does not come about, or is cancelled."""
        number = next(self._numbers)
        name = f"{self._label}-{number}"
        try:
            doorway = Doorway(self._own_folder() / str(number))
        except OSError as error:
            raise SandboxError(f"no socket for {name} could be made: {error}") from error
        arguments = run_arguments(name, self._label, spec, origin, self._abilities, doorway.folder)
        # In a folder that is removed: Podman leaves a file where it was started when memory runs out inside.
        launching = self._engine.ask(*arguments, folder=self._own_folder(), timeout_s=_START_TIMEOUT_S)
        launch = asyncio.ensure_future(launching)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                connected = await self._first_caller(doorway, launch, name)
                settings = agent_settings(spec, origin, self._abilities)
                connection = await Connection.over(connected, settings, spec.forward_sockets)
                await connection.ping(timeout_s=_START_TIMEOUT_S)
        except BaseException as error:
            doorway.close()
            await asyncio.shield(self._abandon(launch, name))
            if isinstance(error, TimeoutError):
                raise SandboxError(f"the agent in {name} did not answer within {_START_TIMEOUT_S:g} s") from None
            raise
        doorway.close()
        return Container(name, origin, connection)

    async def remove(self, container: str) -> None:
        """Returns when it is gone, whoever removed it. Raises SandboxError when it cannot be removed."""
        deadline = time.monotonic() + _REMOVE_TIMEOUT_S
        while True:
            try:
                await self._engine.ask("rm", "--force", "--volumes", container)
                return
            except RefusedError as error:
                if "no such container" in str(error).lower():
                    return
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(0.05)  # the engine is at it, because its agent has ended

    async def end(self, sandbox: ContainerSandbox) -> None:
        """Returns when nothing is left of it."""
        self._live.pop(sandbox.id, None)
        await self.remove(sandbox.container.name)
        await self._images.collect()

    async def _start(self, spec: SandboxSpec) -> ContainerSandbox:
        async with self._starting, contextlib.AsyncExitStack() as exits:
            origin = await self._images.origin_of(spec.image)
            furnished = await exits.enter_async_context(way_out(spec, self._own_folder(), self._egress_log))
            try:
                container = await self._run(furnished, origin)
            except RefusedError as error:
                if error.exit_code != _NOT_FOUND:
                    raise
                image = "the /usr of this machine" if spec.image == HOST_IMAGE else f"image {spec.image!r}"
                raise CapabilityError(
                    f"{image} has no python3, which the {self._engine.name} backend needs inside; add it to the image, "
                    "or take the namespace backend, which needs none"
                ) from error
            sandbox = ContainerSandbox(self, Making(spec, furnished, exits.pop_all()), container)
            self._live[sandbox.id] = sandbox
            return sandbox

    async def _first_caller(self, doorway: Doorway, launch: asyncio.Future[str], name: str) -> socket.socket:
        caller = asyncio.ensure_future(doorway.caller())
        try:
            await asyncio.shield(launch)  # which is never left half-way: see `_abandon`
            while not (await asyncio.wait([caller], timeout=_LOOK_AGAIN_S))[0]:
                if not await self._is_there(name):
                    raise SandboxError(
                        f"the agent in {name} ended at once; it needs a Python of 3.9 or newer with ctypes"
                    )
            return caller.result()
        finally:
            caller.cancel()

    async def _is_there(self, container: str) -> bool:
        return bool(await self._engine.ask("ps", f"--filter=name=^{container}$", "--format={{.Names}}"))

    async def _abandon(self, launch: asyncio.Future[str], name: str) -> None:
        """One after the other: an engine might finish a start after it was told to remove what it starts."""
        await asyncio.gather(launch, return_exceptions=True)
        await self.remove(name)

    async def _tracked(self, work: Coroutine[Any, Any, _Made]) -> _Made:
        """A start that `stop` may cut short."""
        if self._stopped:
            work.close()
            raise SandboxGoneError("the sandbox backend was stopped")
        task = asyncio.ensure_future(work)
        self._starts.add(task)
        task.add_done_callback(self._starts.discard)
        try:
            return await task
        except asyncio.CancelledError:
            if task.done() and not task.cancelled() and not task.exception():  # it came about at the same moment
                await asyncio.shield(self._undo(task.result()))
            current = asyncio.current_task()
            if self._stopped and current and not current.cancelling():
                raise SandboxGoneError("the sandbox backend was stopped") from None
            raise

    async def _undo(self, made: ContainerSandbox | Container) -> None:
        await (made.stop() if isinstance(made, ContainerSandbox) else self.remove(made.name))

    def _own_folder(self) -> Path:
        """Made when it is first needed."""
        if self._folder is None:
            self._folder = make_folder(self._root, self._label)
        return self._folder


class DockerBackend(ContainerBackend):
    """By the daemon that `docker` reaches: DOCKER_HOST says which. It must be on this machine, and see its files."""

    def __init__(self, root: Path | None = None, *, program: str = "docker", **options: Any):
        super().__init__(Engine.find("docker", program), root, **options)


class PodmanBackend(ContainerBackend):
    """By Podman, as root or not. `runtime`: the path of an OCI runtime, where Podman's own choice does not run."""

    def __init__(self, root: Path | None = None, *, program: str = "podman", runtime: str = "", **options: Any):
        super().__init__(Engine.find("podman", program, ("--runtime", runtime) if runtime else ()), root, **options)
