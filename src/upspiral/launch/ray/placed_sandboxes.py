"""Sandboxes on many nodes: one backend made of the servers of several actors, each started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from upspiral.errors import DeadlineError, SandboxError
from upspiral.sandbox.base import Capabilities, Sandbox, SandboxSpec, Snapshot
from upspiral.sandbox.remote import RemoteBackend

START_DEADLINE_S = 300.0
PATIENCE_S = 120.0
"""How long a sandbox that is asked for waits for an actor to come back: as long as a generation waits for an engine."""
_PAUSE_BEFORE_RESTART_S = 1.0
_LOOK_AGAIN_S = 0.1
_log = logging.getLogger(__name__)


class PlacedSandboxes:
    """A new sandbox is made where the fewest live, and elsewhere when it cannot be made there. What lived in an actor
    that died is gone: its rollout is masked, never rewarded."""

    def __init__(
        self, make_actor: Callable[[], Any], count: int, token: str, *, patience_s: float = PATIENCE_S
    ) -> None:
        """`make_actor` makes a `SandboxHost`."""
        self._hosts = [_Host(make_actor, token) for _ in range(count)]
        self._patience_s = patience_s
        self._capabilities: Capabilities | None = None

    async def start(self) -> PlacedSandboxes:
        """Raises DeadlineError when the cluster has no room for an actor, and SandboxError when one dies, and the next
        one in its place."""
        outcomes = await asyncio.gather(*(host.start() for host in self._hosts), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                await self.stop()
                raise outcome
        self._capabilities = self._hosts[0].backend.capabilities
        return self

    @property
    def capabilities(self) -> Capabilities:
        assert self._capabilities is not None, "await start() first"
        return self._capabilities

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
        """Waits while all actors are gone. Raises SandboxError when those that are there refuse it."""
        gives_up = time.monotonic() + self._patience_s
        while True:
            refusals: list[SandboxError] = []
            for host in self._ready():
                backend = host.backend
                try:
                    return host, await stack.enter_async_context(backend.acquire(spec))
                except SandboxError as error:
                    if host.found is backend:
                        refusals.append(error)
            if refusals:
                raise refusals[0]
            if time.monotonic() > gives_up:
                raise SandboxError(f"no actor that makes sandboxes came back within {self._patience_s:g} s")
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def drop(self, snapshot: Snapshot) -> None:
        for host in self._ready():
            await host.backend.drop(snapshot)

    async def stop(self) -> None:
        await asyncio.gather(*(host.stop() for host in self._hosts))

    def _ready(self) -> list[_Host]:
        """Those that answer, the emptiest first."""
        return sorted((host for host in self._hosts if host.found is not None), key=lambda host: host.live)


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
        """A second time when the first actor dies meanwhile."""
        try:
            await self._place()
        except SandboxError as error:
            _log.warning("an actor that makes sandboxes did not start (%s); another one is started", error)
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
        from ray.exceptions import RayError

        self._actor = self._make_actor()
        try:
            url = await asyncio.wait_for(self._actor.start.remote(), START_DEADLINE_S)
        except TimeoutError:
            raise DeadlineError(
                f"the cluster had no room for an actor that makes sandboxes within {START_DEADLINE_S:.0f} s; lower "
                "cluster.sandbox_hosts or add nodes"
            ) from None
        except RayError as error:
            raise SandboxError(f"an actor that makes sandboxes did not start: {error}") from error
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
