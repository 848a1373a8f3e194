"""An engine in an actor, which is started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds
from upspiral.engine.served.client import RemoteEngine
from upspiral.errors import EngineGoneError, StaleBaseError, UpspiralError
from upspiral.types import SamplingParams
from upspiral.weights.publication import Publication

START_DEADLINE_S = 900.0
_PAUSE_BEFORE_RESTART_S = 1.0
_log = logging.getLogger(__name__)


class PlacedEngine:
    """What was under way when the actor died raises EngineError, and so does every call until another one has taken its
    place, with the weights that it had. Token counts go on from those of the dead."""

    def __init__(self, make_actor: Callable[[], Any], key: str) -> None:
        """`make_actor` makes an `EngineHost`."""
        self._make_actor, self._key = make_actor, key
        self._actor: Any = None
        self._client: RemoteEngine | None = None
        self._watch: asyncio.Task[None] | None = None
        self._publication: Publication | None = None
        self._context_length = self._version = 0
        self._pauses = 0
        self._sampled = self._prefilled = self._reused = 0
        """Of actors that died."""

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def version(self) -> int:
        return self._client.version if self._client is not None else self._version

    def stats(self) -> EngineStats:
        now = EngineStats() if self._client is None else self._client.stats()
        return EngineStats(
            now.running, now.waiting, self._sampled + now.sampled_tokens, self._prefilled + now.prefilled_tokens,
            self._reused + now.reused_tokens, now.extra,
        )  # fmt: skip

    async def start(self) -> None:
        await self._place()
        self._watch = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        import ray

        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        if self._client is not None:
            await self._client.stop()
        if self._actor is not None:
            ray.kill(self._actor)

    def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        return self._placed().generate(prompt_ids, params)

    async def update_weights(self, publication: Publication) -> None:
        self._publication = publication
        await self._placed().update_weights(publication)

    async def pause(self) -> None:
        self._pauses += 1
        await self._placed().pause()

    def resume(self) -> None:
        self._pauses -= 1
        if self._client is not None:
            self._client.resume()

    def _placed(self) -> RemoteEngine:
        if self._client is None:
            raise EngineGoneError("the actor of an engine died; another one is being started")
        return self._client

    async def _place(self) -> None:
        actor = self._make_actor()
        try:
            host, port = await asyncio.wait_for(actor.start.remote(), START_DEADLINE_S)
            client = RemoteEngine(host, port, self._key)
            await client.start()
            if self._publication is not None:
                with contextlib.suppress(StaleBaseError):  # whoever publishes next is told, and publishes it whole
                    await client.update_weights(self._publication)
            for _ in range(self._pauses):
                await client.pause()
        except BaseException:
            import ray

            ray.kill(actor)
            raise
        self._actor, self._client, self._context_length = actor, client, client.context_length

    async def _keep_alive(self) -> None:
        """Until `stop`."""
        while True:
            try:
                await self._actor.live.remote()
            except Exception as error:
                _log.warning("the actor of an engine died (%s); another one is started", error)
            await self._mourn()
            while self._client is None:
                try:
                    await self._place()
                except (UpspiralError, OSError, TimeoutError, RuntimeError) as error:
                    _log.warning("no engine could be started in its place: %s", error)
                    await asyncio.sleep(_PAUSE_BEFORE_RESTART_S)

    async def _mourn(self) -> None:
        client, self._client = self._client, None
        assert client is not None
        # The connection may have given tokens that were on their way; its reader takes them in before it ends.
        await client.stop()
        stats = client.stats()
        self._version = client.version
        self._sampled += stats.sampled_tokens
        self._prefilled += stats.prefilled_tokens
        self._reused += stats.reused_tokens
