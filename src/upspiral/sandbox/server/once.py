"""Operations that are done once, however often they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from upspiral.errors import SandboxGoneError

Answer = TypeVar("Answer")


class Once:
    """Runs operations under ids. A second request of an id waits for the first one's end and gets its answer, as long
    as that is among the last `kept`. An operation goes on when whoever asked has gone: it may come back for it."""

    def __init__(self, kept: int = 64) -> None:
        self._kept = kept
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    async def do(self, op_id: str, work: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        task = self._tasks.get(op_id)
        if task is None:
            task = self._tasks[op_id] = asyncio.create_task(work())
            task.add_done_callback(_look_at)
            self._forget_oldest()
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and not _is_being_cancelled():
                raise SandboxGoneError("the operation was cancelled, or its sandbox was stopped") from None
            raise

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget_oldest(self) -> None:
        done = [op_id for op_id, task in self._tasks.items() if task.done()]
        for op_id in done[: max(0, len(done) - self._kept)]:
            del self._tasks[op_id]


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _look_at(task: asyncio.Task[Any]) -> None:
    """An operation that failed while nobody waited for it is no error of this process."""
    if not task.cancelled():
        task.exception()
