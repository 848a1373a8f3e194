"""An engine in another process, which is started again when that dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds, UpdatableEngine
from upspiral.errors import DeadlineError, EngineError, EngineGoneError, StaleBaseError
from upspiral.types import SamplingParams
from upspiral.weights.publication import Publication

_PAUSE_BEFORE_RESTART_S = 1.0
_log = logging.getLogger(__name__)


class EngineHome(Protocol):
    """A process with an engine."""

    async def start(self) -> UpdatableEngine:
        """Starts the process and a client of its engine, which samples from the model's own folder."""
        ...

    async def gone(self) -> str:
        """Returns when the process has died, with what is known of why."""
        ...

    async def kill(self) -> None:
        """Ends the process and waits for that. Killing it twice, or before it runs, does nothing."""
        ...


class KeptEngine:
    """What was under way when the process died raises EngineError, and every call EngineGoneError until another one
    has taken its place, with the weights that it had. Token counts go on from those of the dead.

    While it sleeps none is started, as that would take the memory that was given up."""

    def __init__(self, make_home: Callable[[], EngineHome]) -> None:
        self._make_home = make_home
        self._home: EngineHome | None = None
        self._client: UpdatableEngine | None = None
        self._watch: asyncio.Task[None] | None = None
        self._publication: Publication | None = None
        self._starting = asyncio.Lock()
        self._awake = asyncio.Event()
        self._awake.set()
        self._context_length = self._version = self._pauses = 0
        self._sampled = self._prefilled = self._reused = 0
        """Of processes that died."""

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
        if self._watch is None:
            await self._place()
            self._watch = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        if self._client is not None:
            await self._client.stop()
        if self._home is not None:
            await self._home.kill()

    def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        return self._running().generate(prompt_ids, params)

    async def update_weights(self, publication: Publication) -> None:
        """A process that died, asleep or awake, is started with it, and one that hangs is ended for that."""
        self._publication = publication
        self._awake.set()
        client, home = self._running(), self._home
        assert home is not None
        try:
            await client.update_weights(publication)
        except DeadlineError as error:
            _log.warning("an engine that did not adopt weights in time is ended, and another one started: %s", error)
            await home.kill()
            raise EngineGoneError(f"{error}; its process was ended, and another one is being started") from error

    async def sleep(self) -> None:
        """A process that does not fall asleep is ended, which gives up its memory too."""
        self._awake.clear()
        async with self._starting:
            client, home = self._client, self._home
            if client is None or home is None:
                return
            try:
                await client.sleep()
            except (EngineError, DeadlineError) as error:
                _log.warning("an engine that did not fall asleep is ended, and started again when it wakes: %s", error)
                await home.kill()

    async def pause(self) -> None:
        await self._running().pause()
        self._pauses += 1

    def resume(self) -> None:
        self._pauses -= 1
        if self._client is not None:
            self._client.resume()

    def _running(self) -> UpdatableEngine:
        if self._client is None:
            raise EngineGoneError("the process of an engine died; another one is being started")
        return self._client

    async def _place(self) -> None:
        home = self._home = self._make_home()
        try:
            client = await home.start()
            if self._publication is not None:
                with contextlib.suppress(StaleBaseError):  # whoever publishes next is told, and publishes it whole
                    await client.update_weights(self._publication)
            for _ in range(self._pauses):
                await client.pause()
        except BaseException:
            await home.kill()
            raise
        self._client, self._context_length = client, client.context_length

    async def _keep_alive(self) -> None:
        """Until `stop`."""
        while True:
            try:
                if self._client is not None:
                    _log.warning("the process of an engine died (%s); another one is started", await self._why_gone())
                    await self._mourn()
                await self._awake.wait()
                async with self._starting:
                    if self._awake.is_set():  # not asked to sleep meanwhile
                        await self._place()
            except Exception as error:  # boundary: whatever fails, somebody has to go on looking after the engine
                _log.warning("no engine could be started in place of one that died: %r", error)
                await asyncio.sleep(_PAUSE_BEFORE_RESTART_S)

    async def _why_gone(self) -> str:
        """Returns when the process is gone, or when nobody can tell whether it is: it is ended then."""
        assert self._home is not None
        try:
            return await self._home.gone()
        except Exception as error:  # boundary, as above
            return f"nobody can say whether and why: {error!r}"

    async def _mourn(self) -> None:
        client, self._client = self._client, None
        assert client is not None and self._home is not None
        stats = client.stats()
        self._version = client.version
        self._sampled += stats.sampled_tokens
        self._prefilled += stats.prefilled_tokens
        self._reused += stats.reused_tokens
        try:
            await client.stop()
        finally:
            await self._home.kill()
