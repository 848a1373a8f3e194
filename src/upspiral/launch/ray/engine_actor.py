"""The home of an engine is an actor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from upspiral.engine.served.client import RemoteEngine
from upspiral.errors import DeadlineError, EngineError
from upspiral.launch.ray.courier import Courier
from upspiral.weights.publication import Publication

START_DEADLINE_S = 900.0


class PlacedEngine(RemoteEngine):
    """An engine on any node: new weights are brought there first."""

    def __init__(self, host: str, port: int, key: str, bring: Callable[[Publication], Awaitable[Publication]]) -> None:
        super().__init__(host, port, key)
        self._bring = bring

    async def update_weights(self, publication: Publication) -> None:
        await super().update_weights(await self._bring(publication))


class EngineActor:
    """See `EngineHome`."""

    def __init__(self, make_actor: Callable[[], Any], key: str, courier: Courier) -> None:
        """`make_actor` makes an `EngineHost`, which serves with the key."""
        self._make_actor, self._key, self._courier = make_actor, key, courier
        self._actor: Any = None

    async def start(self) -> RemoteEngine:
        from ray.exceptions import RayError

        self._actor = self._make_actor()
        try:
            host, port, node = await asyncio.wait_for(self._actor.start.remote(), START_DEADLINE_S)
        except TimeoutError:
            raise DeadlineError(f"an engine's actor did not start within {START_DEADLINE_S:.0f} s") from None
        except RayError as error:
            raise EngineError(f"an engine's actor did not start: {error}") from error
        client = PlacedEngine(host, port, self._key, partial(self._courier.at, node))
        await client.start()
        return client

    async def gone(self) -> str:
        from ray.exceptions import RayError

        try:
            await self._actor.live.remote()
        except RayError as error:
            return str(error)
        return "it ended"

    async def kill(self) -> None:
        import ray

        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)
