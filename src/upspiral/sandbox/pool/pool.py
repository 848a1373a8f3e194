"""The pool itself: requests come, starts begin and end, sandboxes are given away once and then stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from dataclasses import dataclass, replace
from typing import Any

from upspiral.errors import CapabilityError, ImageError, SandboxBusyError, SandboxError
from upspiral.sandbox.base import Capabilities, Sandbox, SandboxBackend, SandboxSpec, Snapshot
from upspiral.sandbox.pool.books import Books
from upspiral.sandbox.pool.limits import PoolLimits
from upspiral.sandbox.pool.metrics import PoolMetrics
from upspiral.sandbox.pool.pace import Breaker, Rate, TokenBucket
from upspiral.sandbox.pool.pooled import PooledSandbox
from upspiral.sandbox.pool.queue import FairQueue, Request, owner_of
from upspiral.sandbox.pool.warm import Kept, Shelf, kind_of

DEFAULT_LIMITS = PoolLimits()
ATTEMPT_LABEL = "attempt"
"""Different for each start: what one that was given up has left behind can be told apart and removed."""
_SERVED_MEMORY_S = 10.0
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 30.0
_LACK_LOOK_S = 1.0
"""How soon the pool looks again when a kind has fewer warm ones than it should."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A moment of a pool. made = stopped + live - starting, always."""

    live: int
    starting: int
    warm: int
    queued: int
    made: int
    stopped: int


class Pool:
    """A backend whose sandboxes come from another backend. Belongs to one event loop.

    A sandbox has one owner in its life: it is made, perhaps waits warm, is given away, and is stopped. Requests that
    cannot be served at once wait in a fair queue, for `limits.wait_s` at most; then, or when too many wait already,
    they get SandboxBusyError. Starts that the infrastructure failed are tried again; a spec that the backend cannot
    honour (CapabilityError, ImageError) is not.
    """

    def __init__(self, backend: SandboxBackend, limits: PoolLimits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.metrics = PoolMetrics()
        self._backend = backend
        self._books = Books(limits.live, self.metrics, self._freed)
        self._queue = FairQueue()
        self._shelves: dict[Hashable, Shelf] = {}
        """The kind that was asked for last stands last."""
        self._bucket = TokenBucket(limits.starts_per_s, limits.start_burst)
        self._breaker = Breaker(limits.breaker_failures, limits.breaker_rest_s)
        self._served = Rate(_SERVED_MEMORY_S)
        self._starts: set[asyncio.Task[Kept]] = set()
        self._stops: set[asyncio.Task[None]] = set()
        self._given: set[Kept] = set()
        """Sandboxes in their owners' hands."""
        self._timer: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        """Set whenever a sandbox has stopped."""
        self._closed = ""
        """Why nobody gets a sandbox any more."""

    @property
    def capabilities(self) -> Capabilities:
        return self._backend.capabilities

    @property
    def stats(self) -> PoolStats:
        books = self._books
        return PoolStats(books.live, books.starting, self._warm, len(self._queue), books.made, books.stopped)

    def exposition(self) -> bytes:
        """The metrics in Prometheus' text format."""
        now = self.stats
        return self.metrics.exposition(live=now.live, starting=now.starting, warm=now.warm, queued=now.queued)

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        kept = await self._acquire(spec)
        del spec  # its files are in the sandbox, and need not be kept here for as long as that lives
        owner = kept.owner or ""
        try:
            yield PooledSandbox(kept.sandbox, owner, self._books, self.metrics)
        finally:
            await asyncio.shield(self._discard(kept))

    def keep_warm(self, spec: SandboxSpec, *, minimum: int, maximum: int | None = None) -> None:
        """How many of this kind wait ready, instead of what the pool's limits say. The first are made now."""
        shelf = self._shelf(kind_of(spec), spec)
        shelf.minimum = minimum
        shelf.maximum = max(minimum, self.limits.warm_max if maximum is None else maximum)
        self._pump()

    async def drop(self, snapshot: Snapshot) -> None:
        for kind, shelf in list(self._shelves.items()):
            if shelf.spec.image == snapshot:
                self._forget(kind)
        await self._backend.drop(snapshot)

    async def drain(self, *, timeout_s: float) -> None:
        """Gives no more sandboxes away, and waits until all are returned, but no longer than `timeout_s`."""
        self._close("is being drained")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._books.live:
                    self._room.clear()
                    await self._room.wait()

    async def stop(self) -> None:
        self._close("was stopped")
        for start in self._starts:
            start.cancel()
        for kept in self._given:
            self._discard(kept)
        for fork in list(self._books.forks):
            self._run(fork.stop(), self._stops)
        while self._starts or self._stops:
            await asyncio.wait([*self._starts, *self._stops])
        await self._backend.stop()

    # Getting one

    async def _acquire(self, spec: SandboxSpec) -> Kept:
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(now + self.limits.wait_s):
                kept, is_warm = await self._furnished(spec)
        except TimeoutError:
            raise self._busy("deadline", f"no sandbox within {self.limits.wait_s:g} s") from None
        waited_s = asyncio.get_running_loop().time() - now
        (self.metrics.acquire_warm_s if is_warm else self.metrics.acquire_cold_s).observe(waited_s)
        return kept

    async def _furnished(self, spec: SandboxSpec) -> tuple[Kept, bool]:
        """With the spec's files. One that breaks under that is replaced: it may have broken while it waited."""
        for attempt in range(1, self.limits.attempts + 1):
            kept, is_warm = await self._obtain(spec)
            try:
                for path, content in spec.files.items():
                    await kept.sandbox.write(path, content)
                return kept, is_warm
            except BaseException as error:
                self._discard(kept)
                if isinstance(error, OSError | ValueError):
                    raise SandboxError(f"the files of the spec could not be written: {error}") from error
                if not isinstance(error, SandboxError):
                    raise
                self.metrics.failed("write")
                if attempt == self.limits.attempts:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _obtain(self, spec: SandboxSpec) -> tuple[Kept, bool]:
        now = asyncio.get_running_loop().time()
        kind = kind_of(spec)
        if self._closed:
            raise self._busy("closed", f"the pool {self._closed}")
        shelf = self._shelf(kind, spec)
        shelf.asked(now)
        if kept := shelf.take():
            self._hand_over(kept, owner_of(spec), now)
            self._pump()
            return kept, True
        if self._breaker.is_open(now):
            raise self._broken(now)
        if len(self._queue) >= self.limits.queued:
            raise self._busy("queue", f"{len(self._queue)} requests wait for a sandbox already")
        request = Request(spec, kind, asyncio.get_running_loop().create_future())
        self._queue.add(request)
        self._pump()
        try:
            return await request.answer, False
        except BaseException:
            self._withdraw(request)
            raise

    def _withdraw(self, request: Request) -> None:
        answer = request.answer
        self._queue.discard(request)
        if not answer.cancel() and not answer.cancelled() and answer.exception() is None:
            # It was served in the moment in which it gave up.
            self._discard(answer.result())

    def _hand_over(self, kept: Kept, owner: str, now: float) -> None:
        assert kept.owner is None, "a sandbox has one owner in its life"
        kept.owner = owner
        self._given.add(kept)
        self._books.in_use[owner] += 1
        self._served.add(now)

    # Deciding

    def _pump(self) -> None:
        """Begins what can begin now. Called after everything that changes what that is."""
        now = asyncio.get_running_loop().time()
        for shelf in self._shelves.values():
            while kept := shelf.take_old(now):
                self._discard(kept)
        while (request := self._queue.next(now, self._books.in_use)) and self._may_start(now):
            self._queue.discard(request)
            self._begin(self._shelf(request.kind, request.spec), request)
        if not self._closed and not self._queue:
            self._refill(now)
        self._look_again(now)

    def _may_start(self, now: float) -> bool:
        if self._books.starting >= self.limits.starting or not self._breaker.allows(now):
            return False
        if not self._books.has_room:
            self._evict()
            return False
        return self._bucket.take(now)

    def _evict(self) -> None:
        """Stops warm sandboxes that take the room of somebody who waits; there is room once they have stopped."""
        while len(self._stops) < len(self._queue) and self._warm:
            kept = max(self._shelves.values(), key=len).take()
            assert kept is not None
            self._discard(kept)

    def _refill(self, now: float) -> None:
        for shelf in self._shelves.values():
            while shelf.lacks(now) and self._books.has_room and self._may_start(now):
                self._begin(shelf, None)

    def _look_again(self, now: float) -> None:
        """Sets the timer for what only time changes."""
        times = [shelf.old_at() for shelf in self._shelves.values() if shelf]
        if not self._closed and any(shelf.lacks(max(now, shelf.not_before)) for shelf in self._shelves.values()):
            times.append(now + _LACK_LOOK_S)
        has_room = self._books.has_room and self._books.starting < self.limits.starting
        wait_s = max(self._bucket.wait_s(now), self._breaker.wait_s(now))
        if has_room and wait_s < math.inf and (rested_at := self._queue.first_rested_at()) is not None:
            times.append(max(rested_at, now + wait_s))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if times:
            # A hair later than due, so that rounding never makes it look a moment too early, over and over.
            self._timer = asyncio.get_running_loop().call_at(max(now, min(times)) + 0.0005, self._pump)

    # Making one

    def _begin(self, shelf: Shelf, request: Request | None) -> None:
        self._books.start_begins()
        self._breaker.started()
        if request is None:
            shelf.starting += 1
        else:
            self._books.in_use[request.owner] += 1
        began = asyncio.get_running_loop().time()
        start = asyncio.get_running_loop().create_task(self._make(shelf, request))
        self._starts.add(start)
        # Called also for a task that is cancelled before it has taken a step.
        start.add_done_callback(lambda start: self._start_ended(start, shelf, request, began))

    def _start_ended(self, start: asyncio.Task[Kept], shelf: Shelf, request: Request | None, began: float) -> None:
        now = asyncio.get_running_loop().time()
        self._starts.discard(start)
        failure = SandboxError(f"the pool {self._closed}") if start.cancelled() else start.exception()
        self._books.start_ends(made=failure is None)
        if request is None:
            shelf.starting -= 1
        else:
            self._books.returned(request.owner)
        if failure is None:
            self._breaker.succeeded()
            shelf.created(now - began)
            self.metrics.create_s.observe(now - began)
            self._place(start.result(), shelf, request, now)
        else:
            # Whatever it was, whoever waits for this sandbox is told.
            self._start_failed(failure, shelf, request, now)
        self._freed()

    async def _make(self, shelf: Shelf, request: Request | None) -> Kept:
        labels = {**(request.spec if request else shelf.spec).labels, ATTEMPT_LABEL: secrets.token_hex(8)}
        context = self._backend.acquire(replace(shelf.spec, labels=labels))
        try:
            async with asyncio.timeout(self.limits.start_timeout_s):
                sandbox = await context.__aenter__()
        except TimeoutError:
            raise SandboxError(f"no sandbox was made within {self.limits.start_timeout_s:g} s") from None
        return Kept(sandbox, context, asyncio.get_running_loop().time())

    def _place(self, kept: Kept, shelf: Shelf, request: Request | None, now: float) -> None:
        """Gives it to whom it was made for; to another, when that one has gone; or lets it wait."""
        if request is None or request.answer.done():
            request = self._queue.next(now, self._books.in_use, kind_of(shelf.spec))
        if request is not None and self._closed:
            self._discard(kept)
            request.answer.set_exception(self._busy("closed", f"the pool {self._closed}"))
        elif request is not None:
            self._queue.discard(request)
            self._hand_over(kept, request.owner, now)
            request.answer.set_result(kept)
        elif not self._closed and shelf.is_wanted and len(shelf) < shelf.target(now):
            shelf.put(kept)
        else:
            self._discard(kept)

    def _start_failed(self, error: BaseException, shelf: Shelf, request: Request | None, now: float) -> None:
        rest_s = self._rest_s(error, shelf, request, now)
        if request is None:
            shelf.not_before = now + (self.limits.breaker_rest_s if rest_s is None else rest_s)
        elif not request.answer.done():
            if rest_s is None:
                request.answer.set_exception(error)
            else:
                request.not_before = now + rest_s
                self._queue.add(request, first=True)
        if self._breaker.is_open(now):
            self._refuse_all(lambda: self._broken(now))

    def _rest_s(self, error: BaseException, shelf: Shelf, request: Request | None, now: float) -> float | None:
        """After how long the start is tried again; None: not."""
        if self._closed:
            return None
        if isinstance(error, SandboxBusyError):
            self._breaker.abandoned()
            return error.retry_after_s
        if isinstance(error, CapabilityError | ImageError) or not isinstance(error, SandboxError):
            self._breaker.abandoned()
            return None
        self.metrics.failed("create")
        if shelf.has_been_made or not self._books.made:
            self._breaker.failed(now, str(error))
        else:
            # The backend makes others, and never made this kind: its spec may be at fault, for which nobody else pays.
            self._breaker.abandoned()
        if request is None:
            return self.limits.retry_delay_s
        request.failures += 1
        if request.failures >= self.limits.attempts:
            return None
        return self.limits.retry_delay_s * 2 ** (request.failures - 1) * random.uniform(0.5, 1.5)

    # Ending one

    def _discard(self, kept: Kept) -> asyncio.Task[None]:
        """Once: later calls give the task that stops it already."""
        if kept.end is None:
            kept.end = self._run(self._stop(kept), self._stops)
        return kept.end

    async def _stop(self, kept: Kept) -> None:
        """Never raises: whoever used the sandbox has its results, and what is left is removed with the backend."""
        try:
            async with asyncio.timeout(self.limits.stop_timeout_s):
                await kept.context.__aexit__(None, None, None)
        except Exception as error:
            self.metrics.failed("stop")
            _LOG.warning("sandbox %s did not stop: %r", kept.sandbox.id, error)
        finally:
            if kept.owner is not None:
                self._given.discard(kept)
                self._books.returned(kept.owner)
            self._books.has_stopped()

    def _freed(self) -> None:
        self._room.set()
        self._pump()

    def _close(self, why: str) -> None:
        self._closed = why
        self._refuse_all(lambda: self._busy("closed", f"the pool {why}"))
        for kind in list(self._shelves):
            self._forget(kind)
        if self._timer is not None:
            self._timer.cancel()

    def _forget(self, kind: Hashable) -> None:
        shelf = self._shelves.pop(kind)
        shelf.is_wanted = False
        while kept := shelf.take():
            self._discard(kept)

    # Small things

    @property
    def _warm(self) -> int:
        return sum(map(len, self._shelves.values()))

    def _shelf(self, kind: Hashable, spec: SandboxSpec) -> Shelf:
        shelf = self._shelves.pop(kind, None)
        shelf = Shelf(spec, self.limits) if shelf is None else shelf
        self._shelves[kind] = shelf
        if len(self._shelves) > self.limits.warm_kinds:
            self._forget(next(iter(self._shelves)))
        return shelf

    def _run(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    def _refuse_all(self, error: Callable[[], SandboxError]) -> None:
        for request in self._queue:
            self._queue.discard(request)
            if not request.answer.done():
                request.answer.set_exception(error())

    def _busy(self, why: str, what: str) -> SandboxBusyError:
        self.metrics.refused(why)
        now = asyncio.get_running_loop().time()
        served_per_s = max(self._served.per_s(now), 1.0)
        retry_s = min(_LONGEST_RETRY_S, max(_SHORTEST_RETRY_S, (len(self._queue) + 1) / served_per_s))
        stats = self.stats
        return SandboxBusyError(
            f"{what}: {stats.live} of {self.limits.live} sandboxes are live, {stats.starting} of them starting, and "
            f"{stats.queued} requests wait; try again in {retry_s:.1f} s",
            retry_after_s=retry_s,
        )

    def _broken(self, now: float) -> SandboxBusyError:
        self.metrics.refused("breaker")
        rest_s = max(_SHORTEST_RETRY_S, self._breaker.wait_s(now))
        return SandboxBusyError(
            f"{self.limits.breaker_failures} sandboxes in a row could not be made, the last because: "
            f"{self._breaker.last_failure}; the next one is tried in {rest_s:.1f} s",
            retry_after_s=rest_s,
        )
