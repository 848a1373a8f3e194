"""Decides what the next step computes: every decoding sequence, and prompts as far as the budget goes."""

from __future__ import annotations

from collections.abc import Iterable

from upspiral.config.models import EngineConfig
from upspiral.engine.embedded.cache import SlotCache
from upspiral.engine.embedded.sequence import Batch, Chunk, Sequence

_WORTH_COPYING_TOKENS = 16
"""A shorter prefix is computed again sooner than it is copied."""
_WORTH_WAITING_TOKENS = 8
"""Wait for a sibling whose prefill will give this many tokens more than the cache has now."""


class Scheduler:
    """Waiting, prefilling and decoding sequences. Arrival order decides, but nobody waits behind one who waits for a
    sibling."""

    def __init__(self, cache: SlotCache, config: EngineConfig):
        self.waiting: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.decoding: list[Sequence] = []
        self.reused_tokens = 0
        self.recomputed_tokens = 0
        self._cache = cache
        self._config = config

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.prefilling or self.decoding)

    def schedule(self, arrived: Iterable[Sequence]) -> Batch:
        """The next batch; empty when all that was left has been cancelled."""
        self.waiting.extend(arrived)
        self._drop_cancelled()
        self._admit()
        return Batch(tuple(self.decoding), tuple(self._chunks()))

    def advance(self, batch: Batch) -> None:
        """The batch was computed: its tokens are in the cache, and who finished its prompt decodes from now on."""
        for sequence in batch.decoding:
            self._cache.extend(sequence.slot, 1)
        for chunk in batch.chunks:
            self._cache.extend(chunk.sequence.slot, chunk.count)
            if chunk.completes_prompt:
                self.prefilling.remove(chunk.sequence)
                self.decoding.append(chunk.sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a running sequence out; its slot may be continued by others."""
        (self.decoding if sequence in self.decoding else self.prefilling).remove(sequence)
        self._cache.release(sequence)

    def start_over(self) -> None:
        """What runs waits again, before all others, for its tokens so far to be computed anew; siblings share that as
        they share prompts."""
        running = [*self.decoding, *self.prefilling]
        for sequence in running:
            decodes, slot = sequence in self.decoding, sequence.slot
            self.recomputed_tokens += int((self._cache.planned if decodes else self._cache.lengths)[slot])
            sequence.prompt_ids = self._cache.ids[slot, : self._cache.planned[slot]].copy()
            self._cache.release(sequence)
        self.waiting, self.prefilling, self.decoding = running + self.waiting, [], []

    def abandon(self) -> list[Sequence]:
        """Takes everything out. Who calls it clears the cache."""
        abandoned = [*self.waiting, *self.prefilling, *self.decoding]
        self.waiting, self.prefilling, self.decoding = [], [], []
        return abandoned

    def _drop_cancelled(self) -> None:
        self.waiting = [sequence for sequence in self.waiting if not sequence.cancelled]
        for sequence in [*self.prefilling, *self.decoding]:
            if sequence.cancelled:
                self.finish(sequence)

    def _admit(self) -> None:
        postponed = []
        for sequence in self.waiting:
            running = len(self.prefilling) + len(self.decoding)
            admitted = running < self._config.max_running and self._cache.has_room() and self._start(sequence)
            if not admitted:
                postponed.append(sequence)
        self.waiting = postponed

    def _start(self, sequence: Sequence) -> bool:
        """Gives the sequence a slot, unless it had better wait for the prefix that a sibling computes right now."""
        held, coming = self._cache.match(sequence.prompt_ids)
        source = int(held.argmax())
        prefix = int(held[source])
        if coming.max() >= prefix + _WORTH_WAITING_TOKENS:
            return False
        if prefix < _WORTH_COPYING_TOKENS and prefix < self._cache.lengths[source]:
            prefix = 0
        self._cache.claim(sequence, source, prefix)
        self.reused_tokens += prefix
        self.prefilling.append(sequence)
        return True

    def _chunks(self) -> Iterable[Chunk]:
        budget = self._config.prefill_tokens
        for sequence in self.prefilling:
            if budget == 0:
                return
            start = int(self._cache.lengths[sequence.slot])
            count = min(len(sequence.prompt_ids) - start, budget)
            budget -= count
            yield Chunk(sequence, start, count)
