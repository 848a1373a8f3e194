"""Brings publications to the nodes of engines, where the trainer's node is another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from upspiral.errors import EngineError
from upspiral.launch.ray.weights_host import Files
from upspiral.weights.publication import Publication

DELIVERY_DEADLINE_S = 600.0


class Courier:
    """One for a run. Nodes are known by Ray's ids of them, so several on one machine are several."""

    def __init__(self, make_host: Callable[[str], Any]) -> None:
        """`make_host` makes a `WeightsHost` on a node."""
        self.source: str | None = None
        """The node in whose shared memory the trainer publishes; None: every node sees what it publishes."""
        self._make_host = make_host
        self._hosts: dict[str, Any] = {}
        self._given: tuple[Publication, asyncio.Task[Files]] | None = None
        self._takers = 0

    async def at(self, node: str, publication: Publication) -> Publication:
        """The publication as engines of a node can read it. Raises EngineError when it could not be brought there."""
        if self.source is None or node == self.source:
            return publication
        try:
            async with asyncio.timeout(DELIVERY_DEADLINE_S):
                found = await self._call(node, "find", publication)
                return found or await self._bring(node, publication)
        except TimeoutError:
            raise EngineError(  # no DeadlineError: the engine does not hang
                f"version {publication.version} did not come to node {node} within {DELIVERY_DEADLINE_S:.0f} s"
            ) from None

    def stop(self) -> None:
        """Nothing of what was brought stays."""
        import ray

        while self._hosts:
            ray.kill(self._hosts.popitem()[1])

    async def _bring(self, node: str, publication: Publication) -> Publication:
        async with self._giving(publication) as files:
            return await self._call(node, "take", publication, files)

    @asynccontextmanager
    async def _giving(self, publication: Publication) -> AsyncIterator[Files]:
        """All who want it at the same time have the same files; the object store has them as long as anybody does."""
        if self._given is None or self._given[0] != publication:
            assert self.source is not None
            give = asyncio.create_task(self._call(self.source, "give", publication.folder))
            self._given = publication, give
        self._takers += 1
        try:
            yield await asyncio.shield(self._given[1])
        finally:
            self._takers -= 1
            if not self._takers:
                self._given = None

    async def _call(self, node: str, method: str, *args: Any) -> Any:
        from ray.exceptions import RayError, RayTaskError

        if node not in self._hosts:
            self._hosts[node] = self._make_host(node)
        host = self._hosts[node]
        try:
            return await getattr(host, method).remote(*args)
        except RayTaskError as error:
            raise EngineError(f"weights cannot be brought to or from node {node}: {error.cause}") from error
        except RayError as error:  # another one the next time, with a folder of its own
            if self._hosts.get(node) is host:  # nobody has made another one meanwhile
                del self._hosts[node]
            raise EngineError(f"the actor that brings weights to or from node {node} died: {error}") from error
