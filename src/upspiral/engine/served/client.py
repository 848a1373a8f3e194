"""An engine that another process has."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import numpy as np

from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds
from upspiral.engine.served.wire import (
    Answer,
    Cancel,
    Chunk,
    Done,
    Failed,
    Frames,
    Generate,
    Hello,
    Pause,
    Resume,
    Sleep,
    State,
    Update,
    chunk_of,
    error_of,
)
from upspiral.errors import DeadlineError, EngineError, EngineGoneError, UpspiralError
from upspiral.types import SamplingParams
from upspiral.weights.publication import Publication

CONNECT_DEADLINE_S = 30.0
TOKEN_DEADLINE_S = 900.0
"""As the embedded engine's: a trainer's step or a full queue may stand before the next token."""
UPDATE_DEADLINE_S = 600.0

_Item = Chunk | Done | UpspiralError


class RemoteEngine:
    """The client of an `EngineServer`: one connection for all generations. When it ends, so does every generation, with
    EngineError, and every later call; who owns the process makes a new one."""

    def __init__(self, host: str, port: int, key: str) -> None:
        self._host, self._port, self._key = host, port, key
        self._frames: Frames | None = None
        self._reading: asyncio.Task[None] | None = None
        self._state = State(0, 0, 0, 0, 0, 0, 0, {})
        self._waiting: dict[int, asyncio.Queue[_Item]] = {}
        self._numbers = itertools.count()
        self._gone = "it was not started"

    @property
    def context_length(self) -> int:
        return self._state.context_length

    @property
    def version(self) -> int:
        return self._state.version

    def stats(self) -> EngineStats:
        """As of the last answer: whatever was delivered is counted in it."""
        return self._state.stats()

    async def start(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                self._frames = Frames(*await asyncio.open_connection(self._host, self._port), Answer)
                self._frames.send(Hello(self._key))
                self._state = await self._frames.receive()
        except TimeoutError:
            raise DeadlineError(f"{self} did not answer within {CONNECT_DEADLINE_S:.0f} s") from None
        except (OSError, EOFError) as error:
            raise EngineGoneError(f"{self} cannot be reached ({error}), or the key is not its own") from error
        self._gone = ""
        self._reading = asyncio.create_task(self._read(self._frames))

    async def stop(self) -> None:
        """Ends the connection; the engine goes on."""
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        number, queue = self._open()
        ended = False
        try:
            self._send(Generate(number, np.ascontiguousarray(prompt_ids, np.int32).tobytes(), params))
            while not ended:
                item = await self._next(queue, TOKEN_DEADLINE_S, "a token")
                assert isinstance(item, Chunk), "a generation is answered by chunks"
                ended = item.finish_reason is not None
                yield chunk_of(item)
        except UpspiralError:
            ended = True
            raise
        finally:
            del self._waiting[number]
            if not ended and not self._gone:
                self._send(Cancel(number))

    async def update_weights(self, publication: Publication) -> None:
        folder = str(publication.folder)
        await self._ask(lambda number: Update(
            number, folder, publication.version, publication.base, publication.num_bytes
        ), "the new weights")  # fmt: skip

    async def sleep(self) -> None:
        await self._ask(Sleep, "its memory")

    async def pause(self) -> None:
        await self._ask(Pause, "the pause")

    def resume(self) -> None:
        self._send(Resume(next(self._numbers)))

    async def _ask(self, frame: object, what: str) -> None:
        number, queue = self._open()
        try:
            self._send(frame(number))  # type: ignore[operator]
            await self._next(queue, UPDATE_DEADLINE_S, what)
        except EngineError as error:
            if self._gone:  # what was begun went with it
                raise EngineGoneError(str(error)) from error
            raise
        finally:
            del self._waiting[number]

    def _open(self) -> tuple[int, asyncio.Queue[_Item]]:
        number, queue = next(self._numbers), asyncio.Queue[_Item]()
        self._waiting[number] = queue
        return number, queue

    def _send(self, frame: Generate | Cancel | Update | Sleep | Pause | Resume) -> None:
        if self._gone or self._frames is None:
            raise EngineGoneError(f"{self} is gone: {self._gone}")
        self._frames.send(frame)

    async def _next(self, queue: asyncio.Queue[_Item], deadline_s: float, what: str) -> Chunk | Done:
        try:
            async with asyncio.timeout(deadline_s):
                item = await queue.get()
        except TimeoutError:
            raise DeadlineError(f"{self} did not give {what} within {deadline_s:.0f} s") from None
        if isinstance(item, UpspiralError):
            raise item
        return item

    async def _read(self, frames: Frames) -> None:
        why = "it was stopped"
        try:
            while True:
                self._take(await frames.receive())
        except EOFError as error:
            why = f"its connection ended ({error})"
        finally:
            self._gone = why
            frames.close()
            for queue in self._waiting.values():
                queue.put_nowait(EngineError(f"{self} is gone: {why}"))

    def _take(self, frame: State | Chunk | Done | Failed) -> None:
        if isinstance(frame, State):
            self._state = frame
        elif frame.id in self._waiting:
            self._waiting[frame.id].put_nowait(error_of(frame) if isinstance(frame, Failed) else frame)

    def __str__(self) -> str:
        return f"the engine at {self._host}:{self._port}"
