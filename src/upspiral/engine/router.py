"""One engine made of many: each generation goes where its prefix is, unless that engine has too much to do.

A generation whose engine fails goes on with another one behind the tokens that its reader has: none is sampled twice,
and each keeps the version that sampled it. Failures of the request itself are raised at once. While no engine can take
one, empty chunks say that it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from upspiral.engine.affinity import Affinity
from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds, UpdatableEngine
from upspiral.errors import (
    ContextLengthError,
    DeadlineError,
    EngineError,
    EngineGoneError,
    RequestError,
    StaleBaseError,
    UnknownWeightsError,
)
from upspiral.types import FinishReason, SamplingParams
from upspiral.weights.publication import Publication

PATIENCE_S = 120.0
"""How long generations and new weights wait for an engine to come back when there is none."""
MOST_ATTEMPTS = 5
"""In a row without a token: a request that kills engines must not kill them all day."""
_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.5, 30.0
_MOST_DOUBLINGS = 10
"""Of the back-off; a float has no room for those of an engine that fails all day."""
_LOOK_AGAIN_S = 0.1
_SLACK, _SHARE = 4, 1.25
"""A prefix draws a generation to an engine with at most _SHARE times the mean load and _SLACK more."""
_NEXT_SEED = 0x9E3779B1

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Member:
    """One of the engines. `number` is never used again after it."""

    number: int
    engine: UpdatableEngine
    running: int = 0
    failures: int = 0
    """In a row."""
    closed_until: float = 0.0
    why: str = ""
    """The last failure."""
    draining: bool = False
    pauses: int = 0
    catching_up: asyncio.Task[None] | None = field(default=None, repr=False)

    def failed(self, error: Exception) -> None:
        """Of all that one failure ends, the first counts: the others were under way with it."""
        self.why = str(error)
        now = time.monotonic()
        if now >= self.closed_until:
            doublings = min(self.failures, _MOST_DOUBLINGS)
            self.closed_until = now + min(_BACK_OFF_S * 2**doublings, _LONGEST_BACK_OFF_S)
            self.failures += 1

    def served(self) -> None:
        self.failures, self.closed_until = 0, 0.0

    @property
    def on_trial(self) -> bool:
        """It has failed, and has not yet delivered a token of the generation that tries it again."""
        return self.failures > 0 and self.running > 0

    def __str__(self) -> str:
        return f"engine {self.number}"


def patience_beyond(start_timeout_s: float) -> float:
    """Of a router whose engines may take so long to start: one that dies has to be noticed and started again, and then
    to adopt its weights."""
    return start_timeout_s + PATIENCE_S


class Router:
    """See `UpdatableEngine`. Engines can be added and drained while it runs; it starts and stops those that it has.

    New weights go to all engines at once. As soon as one of them has the new version, new generations go to none that
    has not; one that cannot adopt it is tried again until the next version comes.

    It waits for an engine to come back for `patience_s`, and then raises EngineGoneError.
    """

    def __init__(self, engines: Iterable[UpdatableEngine], *, patience_s: float = PATIENCE_S) -> None:
        self._members = [_Member(number, engine) for number, engine in enumerate(engines)]
        self._next_number = len(self._members)
        self._patience_s = patience_s
        self._affinity = Affinity()
        self._publication: Publication | None = None
        self._adopted_version: int | None = None
        """The newest that an engine has taken from us: nothing older gets new work, even if nothing else is left."""
        self._stopped = False
        self._elsewhere = EngineStats()
        """What engines sampled that were removed, less what others had sampled when they were added."""

    @property
    def context_length(self) -> int:
        """The shortest of them, as any may get any prompt."""
        return min((known for each in self._members if (known := each.engine.context_length)), default=0)

    @property
    def version(self) -> int:
        return max((each.engine.version for each in self._members), default=0)

    def stats(self) -> EngineStats:
        """Sums of what was done for this router: what engines that were removed did stays in them."""
        return _sum([self._elsewhere, *(each.engine.stats() for each in self._members)])

    async def start(self) -> None:
        """When one does not start, stops all and raises its error."""
        self._stopped = False
        try:
            await self._of_all(lambda engine: engine.start())
        except BaseException:
            with contextlib.suppress(EngineError, DeadlineError):
                await self.stop()
            raise

    async def stop(self) -> None:
        self._stopped = True
        for each in self._members:
            if each.catching_up is not None:
                each.catching_up.cancel()
        await self._of_all(lambda engine: engine.stop())

    async def _of_all(self, work: Callable[[UpdatableEngine], Coroutine[Any, Any, None]]) -> None:
        """Raises the first error when all have done it or failed."""
        outcomes = await asyncio.gather(*(work(each.engine) for each in self._members), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    # ---- which engines there are

    @property
    def engines(self) -> Mapping[int, UpdatableEngine]:
        """By the numbers that `drain` takes."""
        return {each.number: each.engine for each in self._members}

    def add(self, engine: UpdatableEngine) -> int:
        """An engine that was started, with the newest version if there is one to have; returns its number."""
        member = _Member(self._next_number, engine)
        self._next_number += 1
        self._members.append(member)
        self._elsewhere = _sum([self._elsewhere, _counts(engine.stats(), -1)])
        if self._publication is not None and engine.version != self._publication.version:
            self._catch_up(member)
        return member.number

    async def drain(self, number: int, *, timeout_s: float) -> UpdatableEngine:
        """Gives an engine no new generation and waits for those under way, then removes it, still running, and returns
        it. Raises DeadlineError when they do not end in time: it then stays, and still gets no new ones."""
        member = next((each for each in self._members if each.number == number), None)
        if member is None:
            raise EngineError(f"there is no engine {number}; there are {sorted(self.engines)}")
        member.draining = True
        deadline = time.monotonic() + timeout_s
        while member.running:
            if time.monotonic() > deadline:
                raise DeadlineError(f"{member} still has {member.running} generations after {timeout_s:g} s")
            await asyncio.sleep(_LOOK_AGAIN_S)
        self._members.remove(member)
        self._affinity.forget(member.number)
        self._elsewhere = _sum([self._elsewhere, _counts(member.engine.stats(), 1)])
        return member.engine

    # ---- generating

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        prompt = np.asarray(prompt_ids, np.int32)
        delivered: list[int] = []
        failures: dict[_Member, Exception] = {}
        attempts, gives_up = 0, time.monotonic() + self._patience_s
        while (ended := _ending(delivered, params, self.context_length - len(prompt))) is None:
            waits_until = time.monotonic() + self._patience_s
            while (member := self._chosen(prompt, failures)) is None:
                self._check_patience(waits_until)
                yield GenerationChunk()
                await asyncio.sleep(_LOOK_AGAIN_S)
            before = len(delivered)
            try:
                async with contextlib.aclosing(self._continue(member, prompt, delivered, params)) as chunks:
                    async for chunk in chunks:
                        delivered += chunk.token_ids
                        if chunk.token_ids or chunk.finish_reason is not None:
                            member.served()
                        yield chunk
                        if chunk.finish_reason is not None:
                            return
                raise EngineError(f"{member} ended a generation without saying why")
            except (ContextLengthError, RequestError):
                raise
            except (EngineError, DeadlineError) as error:
                failures[member] = error
                member.failed(error)
                if isinstance(error, UnknownWeightsError):
                    self._catch_up(member)
                blameless = isinstance(error, EngineGoneError | UnknownWeightsError)
                attempts = 0 if len(delivered) > before else attempts + (not blameless)
                if len(delivered) > before or not blameless:
                    gives_up = time.monotonic() + self._patience_s
                _log.warning("%s failed a generation after %d tokens: %s", member, len(delivered), error)
                if attempts >= MOST_ATTEMPTS:
                    raise EngineError(f"no engine could do it in {attempts} attempts: {_told(failures)}") from error
                if time.monotonic() > gives_up:
                    kind = EngineGoneError if isinstance(error, EngineGoneError) else EngineError
                    raise kind(f"no engine came back {self._patience()} ({_told(failures)})") from error
        yield GenerationChunk(finish_reason=ended)

    async def _continue(
        self, member: _Member, prompt: np.ndarray, delivered: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[GenerationChunk]:
        """The rest of a generation by one engine."""
        ids, rest = prompt, params
        if delivered:
            ids = np.concatenate([prompt, np.asarray(delivered, np.int32)])
            # Of its own: with the same seed, an engine would draw what it drew for the first tokens.
            seed = None if params.seed is None else (params.seed ^ (len(delivered) * _NEXT_SEED)) & 0x7FFFFFFF
            rest = replace(params, max_tokens=params.max_tokens - len(delivered), seed=seed)
        member.running += 1
        self._affinity.learn(ids, member.number)
        try:
            async with contextlib.aclosing(member.engine.generate(ids, rest)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    # What was a prompt to this engine was sampled for the reader, who has its routes.
                    yield replace(chunk, prompt_routes=None) if delivered else chunk
        finally:
            member.running -= 1

    def _chosen(self, prompt: np.ndarray, failures: Mapping[_Member, Exception]) -> _Member | None:
        """None when no engine can take the generation now."""
        able = self._able()
        if not able:
            return None
        # One that has just failed it comes last.
        fresh = [each for each in able if each not in failures]
        return self._choose(prompt, fresh or able)

    def _check_patience(self, waits_until: float) -> None:
        if time.monotonic() > waits_until:
            states = "; ".join(f"{each}: {each.why or self._unfit(each)}" for each in self._members) or "there is none"
            raise EngineGoneError(f"no engine came back {self._patience()} ({states})")

    def _patience(self) -> str:
        return f"within {self._patience_s:g} s"

    def _able(self) -> list[_Member]:
        """Those that may get new work: the newest version alone, as soon as one of them has had it, and of an engine
        that has failed one generation at a time, unless there is no other."""
        now, oldest = time.monotonic(), self._adopted_version
        able = [each for each in self._members if not each.draining and each.closed_until <= now]
        able = [each for each in able if oldest is None or each.engine.version >= oldest]
        newest = self._publication.version if self._publication is not None else None
        able = [each for each in able if each.engine.version == newest] or able
        return [each for each in able if not each.on_trial] or able

    def _unfit(self, member: _Member) -> str:
        return "draining" if member.draining else f"it has version {member.engine.version}, not {self._adopted_version}"

    def _choose(self, prompt: np.ndarray, able: Sequence[_Member]) -> _Member:
        most = _SHARE * sum(each.running for each in able) / len(able) + _SLACK
        drawn = self._affinity.longest(prompt, {each.number for each in able if each.running <= most})
        if drawn is not None:
            return next(each for each in able if each.number == drawn)
        return min(able, key=lambda each: (each.running, each.engine.stats().waiting))

    # ---- weights

    async def update_weights(self, publication: Publication) -> None:
        """Raises StaleBaseError when an engine needs the weights whole, and EngineError when none could adopt them.
        Where all have died, asleep or awake, it waits for the first that is started again."""
        self._publication = publication
        gives_up = time.monotonic() + self._patience_s
        while not await self._adopted(publication, waits=time.monotonic() < gives_up):
            await asyncio.sleep(_LOOK_AGAIN_S)
        self._adopted_version = publication.version

    async def _adopted(self, publication: Publication, *, waits: bool) -> bool:
        """False when all engines are gone, if somebody `waits` for them; the others catch up later."""
        members = list(self._members)  # those that come and go meanwhile have no outcome
        outcomes = await asyncio.gather(
            *(each.engine.update_weights(publication) for each in members), return_exceptions=True
        )
        failures: dict[_Member, Exception] = {}
        for member, outcome in zip(members, outcomes, strict=True):
            if isinstance(outcome, EngineError | DeadlineError):
                failures[member] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
        if stale := next((error for error in failures.values() if isinstance(error, StaleBaseError)), None):
            raise stale
        all_gone = all(isinstance(failures.get(member), EngineGoneError) for member in members)
        if waits and all_gone:
            return False
        for member, error in failures.items():
            member.failed(error)
            self._catch_up(member)
        if failures and len(failures) == len(outcomes):
            kind = EngineGoneError if all_gone else EngineError
            raise kind(f"no engine could adopt version {publication.version}: {_told(failures)}")
        return True

    async def sleep(self) -> None:
        """Of all engines, also those that get no work. Raises the error of one that may have kept its memory."""
        catching_up = [each.catching_up for each in self._members if each.catching_up is not None]
        for task in catching_up:
            task.cancel()  # the next version comes to all of them, and this one would wake its engine
        await asyncio.gather(*catching_up, return_exceptions=True)
        await self._of_all(lambda engine: engine.sleep())

    def _catch_up(self, member: _Member) -> None:
        if not self._stopped and (member.catching_up is None or member.catching_up.done()):
            member.catching_up = asyncio.create_task(self._until_current(member))

    async def _until_current(self, member: _Member) -> None:
        """Tries again until the engine has the newest weights or is removed."""
        while True:
            await asyncio.sleep(max(_LOOK_AGAIN_S, member.closed_until - time.monotonic()))
            publication = self._publication
            if publication is None or member not in self._members:
                return
            try:
                # Also when it says that it has the version: it may have failed to show it.
                await member.engine.update_weights(publication)
            except StaleBaseError:
                return  # the next publication tells its publisher
            except Exception as error:  # boundary: nobody waits for this, and it must not end before it is done
                member.failed(error)
                continue
            if publication is self._publication:
                return member.served()

    async def pause(self) -> None:
        """Of the engines that answer; one that has failed samples nothing."""
        await asyncio.gather(*(self._pause(each) for each in self._members))

    async def _pause(self, member: _Member) -> None:
        with contextlib.suppress(EngineError, DeadlineError):
            await member.engine.pause()
            member.pauses += 1

    def resume(self) -> None:
        for each in self._members:
            if each.pauses:
                each.pauses -= 1
                with contextlib.suppress(EngineError):
                    each.engine.resume()


def _ending(delivered: Sequence[int], params: SamplingParams, room: int) -> FinishReason | None:
    """Why a generation is over whose engine failed behind its last token."""
    if delivered and delivered[-1] in params.stop_token_ids:
        return "stop"
    if delivered and len(delivered) >= min(params.max_tokens, room):
        return "length"
    return None


def _told(failures: Mapping[_Member, Exception]) -> str:
    return "; ".join(f"{member}: {error}" for member, error in failures.items())


def _counts(stats: EngineStats, sign: int) -> EngineStats:
    """What only grows."""
    return EngineStats(
        sampled_tokens=sign * stats.sampled_tokens, prefilled_tokens=sign * stats.prefilled_tokens,
        reused_tokens=sign * stats.reused_tokens, extra={name: sign * value for name, value in stats.extra.items()},
    )  # fmt: skip


def _sum(parts: Sequence[EngineStats]) -> EngineStats:
    extra: dict[str, float] = {}
    for part in parts:
        for name, value in part.extra.items():
            extra[name] = extra.get(name, 0.0) + value
    return EngineStats(
        sum(part.running for part in parts), sum(part.waiting for part in parts),
        sum(part.sampled_tokens for part in parts), sum(part.prefilled_tokens for part in parts),
        sum(part.reused_tokens for part in parts), extra=extra,
    )  # fmt: skip
