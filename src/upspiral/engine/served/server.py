"""Serves an engine to the clients that have its key."""

from __future__ import annotations

import asyncio
import hmac

import numpy as np

from upspiral.engine.base import UpdatableEngine
from upspiral.engine.served.wire import (
    Cancel,
    Done,
    Frames,
    Generate,
    Hello,
    Pause,
    Request,
    Resume,
    Sleep,
    State,
    Update,
    chunk_frame,
    failed,
    publication_of,
)
from upspiral.errors import UpspiralError

HELLO_DEADLINE_S = 10.0


class EngineServer:
    """Over TCP. A client that goes takes its generations with it; starting and stopping the engine is its owner's."""

    def __init__(self, engine: UpdatableEngine, key: str) -> None:
        self._engine, self._key = engine, key
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int = 0) -> int:
        """Returns the port."""
        self._server = await asyncio.start_server(self._meet, host, port)
        return self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for client in list(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        frames = Frames(reader, writer, Request)
        try:
            async with asyncio.timeout(HELLO_DEADLINE_S):
                hello = await frames.receive()
            if isinstance(hello, Hello) and hmac.compare_digest(hello.key, self._key):
                await _Client(self._engine, frames).serve()
        except (EOFError, TimeoutError):
            pass
        finally:
            frames.close()
            self._clients.discard(task)


class _Client:
    """One connection."""

    def __init__(self, engine: UpdatableEngine, frames: Frames) -> None:
        self._engine, self._frames = engine, frames
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._pauses = 0

    async def serve(self) -> None:
        self._send_state()
        try:
            while True:
                self._take(await self._frames.receive())
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            for _ in range(self._pauses):  # nobody else knows of them
                self._engine.resume()

    def _take(self, frame: Generate | Cancel | Update | Sleep | Pause | Resume | Hello) -> None:
        match frame:
            case Generate():
                self._begin(frame.id, self._generate(frame))
            case Update():
                self._begin(frame.id, self._update(frame))
            case Sleep():
                self._begin(frame.id, self._sleep(frame))
            case Pause():
                self._begin(frame.id, self._pause(frame))
            case Cancel() if frame.id in self._tasks:
                self._tasks[frame.id].cancel()
            case Resume() if self._pauses:
                self._pauses -= 1
                self._engine.resume()
            case _:
                pass

    def _begin(self, number: int, work: object) -> None:
        task = asyncio.ensure_future(self._answer(number, work))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _answer(self, number: int, work: object) -> None:
        try:
            await work  # type: ignore[misc]
        except UpspiralError as error:
            self._send_state()
            self._frames.send(failed(number, error))
        except Exception as error:  # a bug of the engine's, which its client must hear of
            self._frames.send(failed(number, error))
            raise

    async def _generate(self, frame: Generate) -> None:
        prompt_ids = np.frombuffer(frame.prompt_ids, np.int32)
        async for chunk in self._engine.generate(prompt_ids, frame.params):
            self._send_state()
            self._frames.send(chunk_frame(frame.id, chunk))
            await self._frames.drain()

    async def _update(self, frame: Update) -> None:
        await self._engine.update_weights(publication_of(frame))
        self._send_state()
        self._frames.send(Done(frame.id))

    async def _sleep(self, frame: Sleep) -> None:
        await self._engine.sleep()
        self._send_state()
        self._frames.send(Done(frame.id))

    async def _pause(self, frame: Pause) -> None:
        await self._engine.pause()
        self._pauses += 1
        self._send_state()
        self._frames.send(Done(frame.id))

    def _send_state(self) -> None:
        stats = self._engine.stats()
        counts = stats.sampled_tokens, stats.prefilled_tokens, stats.reused_tokens
        state = State(
            self._engine.version, self._engine.context_length, stats.running, stats.waiting, *counts, stats.extra
        )
        self._frames.send(state)
