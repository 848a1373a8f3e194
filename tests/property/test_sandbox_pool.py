"""Laws of the pool of sandboxes, whatever comes when: a state machine over a backend whose starts and stops fail and
take their time, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.sandbox.virtual_time import VirtualTimeLoop
from upspiral.errors import SandboxBusyError, SandboxError
from upspiral.sandbox.base import Sandbox, SandboxSpec
from upspiral.sandbox.fake import FakeBackend, FakeSandbox, Faults
from upspiral.sandbox.pool import Pool, PoolLimits
from upspiral.sandbox.pool.queue import PURPOSE_LABEL, RUN_LABEL, SCORING

LIMITS = PoolLimits(
    live=6, starting=2, starts_per_s=5.0, start_burst=3, queued=4, wait_s=20.0, start_timeout_s=6.0, stop_timeout_s=4.0,
    attempts=2, breaker_failures=4, breaker_rest_s=3.0, warm_min=1, warm_max=3, warm_age_s=30.0, warm_kinds=2,
)  # fmt: skip
KINDS = (SandboxSpec(), SandboxSpec(env={"A": "1"}), SandboxSpec(env={"A": "2"}))


class UnreliableBackend(FakeBackend):
    """Some starts take longer than they may, some fail; stops take a while. Counts what the pool asks of it."""

    def __init__(self, seed: int) -> None:
        super().__init__(faults=Faults(stop_s=0.3))
        self._dice = random.Random(seed)
        self.starting = 0
        self.most_starting = 0
        self.live = 0
        self.most_live = 0

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[FakeSandbox]:
        self.starting += 1
        self.live += 1
        self.most_starting = max(self.most_starting, self.starting)
        self.most_live = max(self.most_live, self.live)
        try:
            try:
                await asyncio.sleep(self._dice.choice((0.0, 0.1, 1.0, 5.0, 8.0)))
                if self._dice.random() < 0.25:
                    raise SandboxError("an unlucky start")
            finally:
                self.starting -= 1
            async with super().acquire(spec) as sandbox:
                yield sandbox
        finally:
            self.live -= 1


class PoolMachine(RuleBasedStateMachine):
    """Owners come, use their sandbox, leave or lose patience; time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        self.backend = UnreliableBackend(seed=0)
        self.pool: Pool = self.loop.run_until_complete(self._make())
        self.owners: list[asyncio.Task[None]] = []
        self.leave: dict[asyncio.Task[None], asyncio.Event] = {}
        self.seen: Counter[str] = Counter()
        """How often each sandbox was given away."""
        self.ended: Counter[str] = Counter()

    async def _make(self) -> Pool:
        return Pool(self.backend, LIMITS)

    def teardown(self) -> None:
        self.loop.run_until_complete(self.pool.stop())
        for task in self.owners:
            task.cancel()
        self.loop.run_until_complete(asyncio.wait_for(self._gather(), 100))
        stats = self.pool.stats
        assert (stats.live, stats.made) == (0, stats.stopped)
        assert self.backend.live == 0 and all(sandbox.is_stopped for sandbox in self.backend.sandboxes)
        self.loop.close()

    async def _gather(self) -> None:
        for ended in await asyncio.gather(*self.owners, return_exceptions=True):
            assert ended is None or isinstance(ended, SandboxError | asyncio.CancelledError), ended

    @rule(kind=st.sampled_from(KINDS), run=st.sampled_from("abc"), scoring=st.booleans(), files=st.booleans())
    def come(self, kind: SandboxSpec, run: str, scoring: bool, files: bool) -> None:
        labels = {RUN_LABEL: run, **({PURPOSE_LABEL: SCORING} if scoring else {})}
        spec = SandboxSpec(env=kind.env, labels=labels, files={"mine": run.encode()} if files else {})
        leave = asyncio.Event()
        task = self.loop.create_task(self._own(spec, leave))
        self.owners.append(task)
        self.leave[task] = leave

    async def _own(self, spec: SandboxSpec, leave: asyncio.Event) -> None:
        began = self.loop.time()
        try:
            async with self.pool.acquire(spec) as sandbox:
                await self._check_fresh(sandbox, spec)
                await sandbox.write("dirt", b"of its owner")
                await leave.wait()
        except SandboxBusyError as busy:
            self.ended["busy"] += 1
            assert busy.retry_after_s > 0
            assert self.loop.time() - began <= LIMITS.wait_s + 0.01, "a wait without bounds"

    async def _check_fresh(self, sandbox: Sandbox, spec: SandboxSpec) -> None:
        self.seen[sandbox.id] += 1
        assert self.seen[sandbox.id] == 1, "two owners of one sandbox"
        assert await sandbox.list_files() == sorted(spec.files), "a dirty sandbox"
        inner = next(each for each in self.backend.sandboxes if each.id == sandbox.id)
        assert inner.spec.env == spec.env, "a sandbox of another kind"

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        self.leave[data.draw(st.sampled_from(self.owners))].set()

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def lose_patience(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.owners)).cancel()

    @rule(seconds=st.sampled_from((0.0, 0.05, 0.4, 2.0, 7.0, 40.0)))
    def wait(self, seconds: float) -> None:
        self.loop.run_until_complete(asyncio.sleep(seconds))

    @rule(seed=st.integers(0, 1000))
    def shake(self, seed: int) -> None:
        self.backend._dice.seed(seed)

    @invariant()
    def books_close(self) -> None:
        stats = self.pool.stats
        assert stats.made == stats.stopped + stats.live - stats.starting
        assert stats.live <= LIMITS.live and stats.starting <= LIMITS.starting and stats.queued <= LIMITS.queued
        assert self.backend.most_live <= LIMITS.live and self.backend.most_starting <= LIMITS.starting

    @invariant()
    def nobody_failed_a_law(self) -> None:
        for task in self.owners:
            if task.done() and not task.cancelled() and (error := task.exception()):
                assert isinstance(error, SandboxError), error


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
