"""Sandboxes on many nodes: one backend made of the servers of several actors, each started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from upspiral.errors import SandboxError
from upspiral.sandbox.base import Capabilities, Sandbox, SandboxSpec, Snapshot
from upspiral.sandbox.remote import RemoteBackend

START_DEADLINE_S = 300.0
_PAUSE_BEFORE_RESTART_S = 1.0
_log = logging.getLogger(__name__)


class PlacedSandboxes:
    """A new sandbox is made where the fewest live, and elsewhere when it cannot be made there. What lived in an actor
    that died is gone: its rollout is masked, never rewarded."""

    def __init__(self, make_actor: Callable[[], Any], count: int, token: str) -> None:
        """`make_actor` makes a `SandboxHost`."""
        self._hosts = [_Host(make_actor, token) for _ in range(count)]

    async def start(self) -> PlacedSandboxes:
        async with asyncio.TaskGroup() as group:
            for host in self._hosts:
                group.create_task(host.start())
        return self

    @property
    def capabilities(self) -> Capabilities:
        return self._ready()[0].backend.capabilities

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        async with contextlib.AsyncExitStack() as stack:
            host, sandbox = await self._acquired(spec, stack)
            host.live += 1
            try:
                yield sandbox
            finally:
                host.live -= 1

    async def _acquired(self, spec: SandboxSpec, stack: contextlib.AsyncExitStack) -> tuple[_Host, Sandbox]:
        failures: list[SandboxError] = []
        for host in self._ready():
            try:
                return host, await stack.enter_async_context(host.backend.acquire(spec))
            except SandboxError as error:
                failures.append(error)
        raise failures[0]

    async def drop(self, snapshot: Snapshot) -> None:
        for host in self._ready():
            await host.backend.drop(snapshot)

    async def stop(self) -> None:
        await asyncio.gather(*(host.stop() for host in self._hosts))

    def _ready(self) -> list[_Host]:
        """Those that answer, the emptiest first."""
        ready = sorted((host for host in self._hosts if host.found is not None), key=lambda host: host.live)
        if not ready:
            raise SandboxError("every actor that makes sandboxes has died; others are being started")
        return ready


class _Host:
    """One actor after the other, in the same place."""

    def __init__(self, make_actor: Callable[[], Any], token: str) -> None:
        self._make_actor, self._token = make_actor, token
        self._actor: Any = None
        self._watch: asyncio.Task[None] | None = None
        self.found: RemoteBackend | None = None
        self.live = 0

    @property
    def backend(self) -> RemoteBackend:
        if self.found is None:
            raise SandboxError("the actor that makes sandboxes here has died; another one is being started")
        return self.found

    async def start(self) -> None:
        await self._place()
        self._watch = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        import ray

        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self.found is not None:
            await self.found.stop()
        if self._actor is not None:
            ray.kill(self._actor)

    async def _place(self) -> None:
        self._actor = self._make_actor()
        url = await asyncio.wait_for(self._actor.start.remote(), START_DEADLINE_S)
        self.found = await RemoteBackend(url, self._token, patience_s=1.0).connect()

    async def _keep_alive(self) -> None:
        """Until `stop`."""
        while True:
            with contextlib.suppress(Exception):
                await self._actor.live.remote()
            _log.warning("an actor that makes sandboxes died; another one is started")
            lost, self.found = self.found, None
            if lost is not None:
                with contextlib.suppress(SandboxError):
                    await lost.stop()
            while self.found is None:
                try:
                    await self._place()
                except Exception as error:  # Ray's errors have no base of their own
                    _log.warning("none could be started in its place: %s", error)
                    await asyncio.sleep(_PAUSE_BEFORE_RESTART_S)
