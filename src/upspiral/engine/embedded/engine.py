"""The embedded engine: one thread that turns the trainer's weights into tokens for an asyncio event loop.

The same thread runs the trainer's steps (`exclusive`). That they never run at once is one reason; speed is the other:
torch keeps a team of OpenMP threads for each thread that computes, and as soon as there are more of them than cores,
libgomp stops spinning at barriers. Small operations then cost five times as much (measured: 157 against 88 ms for a
decoding step of 64 sequences on two cores).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from upspiral.config.models import EngineConfig
from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds
from upspiral.engine.embedded.adoption import Adoption
from upspiral.engine.embedded.cache import SlotCache
from upspiral.engine.embedded.decoder import DecoderForward
from upspiral.engine.embedded.exact import ExactForward
from upspiral.engine.embedded.sampler import sample
from upspiral.engine.embedded.scheduler import Scheduler
from upspiral.engine.embedded.sequence import Batch, Delivery, Sequence
from upspiral.errors import ConfigError, ContextLengthError, DeadlineError, EngineError, RequestError
from upspiral.types import SamplingParams
from upspiral.weights.cpu import give_back_freed_memory, use_threads
from upspiral.weights.experts import expert_layers
from upspiral.weights.load import LoadedModel
from upspiral.weights.publication import Publication

_log = logging.getLogger(__name__)

_TOKEN_DEADLINE_S = 900.0
"""How long a request waits for its next token; a trainer step or a full queue may stand before it."""
_STEP_DEADLINE_S = 120.0
"""How long a pause or a stop waits for the step under way."""
_EXCLUSIVE_DEADLINE_S = 3600.0
"""How long work handed to the engine's thread may take, the wait for its turn included."""

Result = TypeVar("Result")


class EmbeddedEngine:
    """Continuous batching over a shared prefix cache; see engine/base.py for what callers may rely on.

    Weights are those of `model`, updated in place by the trainer between steps: do that in `exclusive`, with `publish`
    as its last act, so that no token is sampled from new weights under the old version. Sampling is a function of
    `seed`, the request's seed (or its number in the order of arrival) and the logits, not of the batch.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig, *, seed: int, threads: int = 0):
        """`threads`: CPU threads of a step and of `exclusive` work; 0 leaves torch's number alone. For more than one,
        keep torch at one thread elsewhere in the process (`torch.set_num_threads(1)` before anything computes)."""
        limit = model.config.max_position_embeddings
        if config.context_length > limit:
            raise ConfigError(
                f"engine.context_length = {config.context_length}, but the model was made for {limit} positions "
                f"(max_position_embeddings); set engine.context_length to at most {limit}"
            )
        self._model, self._config, self._seed = model, config, seed
        self._cache = SlotCache(model, config.cache_slots, config.context_length)
        if config.routes == "replay":
            self._cache.keep_routes(*_route_shape(model))
        self._scheduler = Scheduler(self._cache, config)
        self._forward = (ExactForward if config.exact else DecoderForward)(model, self._cache)
        self._adoption = Adoption(model.module)
        self._adopting = asyncio.Lock()
        self._asleep = False
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._arrived: list[Sequence] = []
        self._work: deque[Callable[[], None]] = deque()
        self._pauses = 0
        self._stepping = False
        self._stopping = False
        self._weights_changed = True
        # Written by one thread only:
        self._requests = 0
        self._sampled_tokens = self._prefilled_tokens = self._steps = self._failed_steps = 0
        self._threads = threads
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def context_length(self) -> int:
        return self._config.context_length

    @property
    def version(self) -> int:
        return self._cache.version

    # ---- the event loop's side

    async def start(self) -> None:
        """Starts the engine thread. Starting a running engine does nothing."""
        if self._thread is None:
            self._loop, self._stopping = asyncio.get_running_loop(), False
            self._thread = threading.Thread(target=self._serve, name="embedded-engine", daemon=True)
            self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step under way; requests still open get EngineError."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        await asyncio.to_thread(thread.join, _STEP_DEADLINE_S)
        if thread.is_alive():
            raise DeadlineError(f"the embedded engine's last step did not end within {_STEP_DEADLINE_S:.0f} s")

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        """See Engine.generate. Raises RequestError for token ids outside the vocabulary, DeadlineError when no token
        comes for fifteen minutes."""
        sequence = self._submit(prompt_ids, params)
        try:
            while True:
                item = await self._next(sequence)
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            sequence.cancelled = True

    async def _next(self, sequence: Sequence) -> Delivery:
        if not sequence.deliveries.empty():
            return sequence.deliveries.get_nowait()
        try:
            async with asyncio.timeout(_TOKEN_DEADLINE_S):
                return await sequence.deliveries.get()
        except TimeoutError:
            stats = self.stats()
            raise DeadlineError(
                f"no token from the embedded engine within {_TOKEN_DEADLINE_S:.0f} s ({stats.running} requests "
                f"running, {stats.waiting} waiting, paused: {self._pauses > 0})"
            ) from None

    def _submit(self, prompt_ids: TokenIds, params: SamplingParams) -> Sequence:
        if self._thread is None or not self._thread.is_alive():
            raise EngineError("the embedded engine is not running; call start() first")
        prompt = self._check_prompt(prompt_ids, params)
        sequence = Sequence(
            prompt_ids=prompt,
            params=params,
            max_tokens=min(params.max_tokens, self.context_length - len(prompt)),
            random=self._random(params),
            deliveries=asyncio.Queue(),
        )
        with self._changed:
            self._arrived.append(sequence)
            self._changed.notify_all()
        return sequence

    def _check_prompt(self, prompt_ids: TokenIds, params: SamplingParams) -> NDArray[np.int32]:
        if len(prompt_ids) >= self.context_length:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens, but prompt and completion together may have "
                f"{self.context_length}; shorten the prompt or raise engine.context_length"
            )
        if len(prompt_ids) == 0 or params.max_tokens < 1:
            raise RequestError(
                f"a prompt of {len(prompt_ids)} tokens with max_tokens = {params.max_tokens}: both must be at least 1"
            )
        prompt = np.asarray(prompt_ids, np.int32)
        vocabulary = self._model.config.vocab_size
        if prompt.min() < 0 or prompt.max() >= vocabulary:
            raise RequestError(
                f"the prompt has token ids from {prompt.min()} to {prompt.max()}, but the model's vocabulary is "
                f"0 to {vocabulary - 1}; was it rendered for another model?"
            )
        return prompt

    def _random(self, params: SamplingParams) -> np.random.Generator:
        number, self._requests = self._requests, self._requests + 1
        by_request = (1, number) if params.seed is None else (2, params.seed)
        # Seeds may be negative, a seed sequence takes words of 64 bits.
        return np.random.default_rng([part % 2**64 for part in (self._seed, *by_request)])

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.prefilling) + len(scheduler.decoding),
            waiting=len(scheduler.waiting) + len(self._arrived),
            sampled_tokens=self._sampled_tokens,
            prefilled_tokens=self._prefilled_tokens,
            reused_tokens=scheduler.reused_tokens,
            extra={
                "steps": self._steps,
                "failed_steps": self._failed_steps,
                "recomputed_tokens": scheduler.recomputed_tokens,
                **self._cache.counts(),
            },
        )

    # ---- the trainer's side

    async def exclusive(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the engine's thread between two steps, such as an optimizer step that writes the weights in
        place, and gives what it returns or raises what it raises. `work` may call `publish`."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Result] = loop.create_future()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:  # whatever it is belongs to the caller, not to the engine's thread
                loop.call_soon_threadsafe(_settle, outcome, None, error)
            else:
                loop.call_soon_threadsafe(_settle, outcome, result, None)

        if self._thread is None or not self._thread.is_alive():
            raise EngineError("the embedded engine is not running; call start() first")
        with self._changed:
            self._work.append(run)
            self._changed.notify_all()
        try:
            return await asyncio.wait_for(outcome, _EXCLUSIVE_DEADLINE_S)
        except TimeoutError as error:
            raise DeadlineError(
                f"work on the embedded engine's thread did not end within {_EXCLUSIVE_DEADLINE_S:.0f} s"
            ) from error

    async def pause(self) -> None:
        """Holds tokens back: returns when no step runs, and none runs until `resume`. Requests, old and new, wait and
        go on afterwards; `exclusive` work still runs. Pauses nest: each needs a `resume` of its own."""
        with self._changed:
            self._pauses += 1
        try:
            await asyncio.to_thread(self._await_end_of_step)
        except BaseException:
            self.resume()
            raise

    def resume(self) -> None:
        """Takes one `pause` back."""
        with self._changed:
            assert self._pauses > 0, "resume() without pause()"
            self._pauses -= 1
            self._changed.notify_all()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """`pause` and `resume` around a block."""
        await self.pause()
        try:
            yield
        finally:
            self.resume()

    async def update_weights(self, publication: Publication) -> None:
        """See UpdatableEngine. The engine samples on while the weights are read and checked; copying them in place is
        what it waits for."""
        # Not left half-way by a caller that is cancelled: what is copied from would be overwritten.
        await asyncio.shield(self._update_weights(publication))

    async def _update_weights(self, publication: Publication) -> None:
        async with self._adopting:
            if publication.version == self.version and not self._asleep:
                return
            with ExitStack() as stack:
                copy = await asyncio.to_thread(stack.enter_context, self._adoption.checked(publication))

                def adopt() -> None:
                    copy()
                    self._take_cache_again()
                    self.publish(publication.version)

                await self.exclusive(adopt)
            if self._asleep:
                self._asleep = False
                self.resume()

    def _take_cache_again(self) -> None:
        try:
            self._cache.take_again()
        except ConfigError as error:
            raise EngineError(f"an engine that slept cannot go on: {error}") from error

    async def sleep(self) -> None:
        """See UpdatableEngine. Not where a trainer shares the weights: they are given up as well."""
        await asyncio.shield(self._sleep())

    async def _sleep(self) -> None:
        async with self._adopting:
            if self._asleep:
                return
            await self.pause()
            try:
                await self.exclusive(self._give_up)
            except BaseException:
                self.resume()
                raise
            self._asleep = True

    def _give_up(self) -> None:
        self._adoption.give_up()
        self._scheduler.start_over()
        self._cache.give_up()
        give_back_freed_memory()

    def publish(self, version: int, *, recompute: bool = False) -> None:
        """The weights have changed in place: tokens carry `version` from now on and no prefix is reused across it.

        Generations under way go on: on the keys and values they have, so that each token's log-probability is that of
        a model between two versions; or with `recompute` on those that the new weights give for all tokens so far.
        Waits for the step under way and blocks its caller so long, except as the last act of `exclusive` work. Raises
        ModelError when a weight was replaced instead of updated in place.
        """
        if threading.current_thread() is self._thread:
            self._adopt(version, recompute)
            return
        with self._changed:
            self._pauses += 1
            try:
                self._await_end_of_step()
                self._adopt(version, recompute)
            finally:
                self.resume()

    def _adopt(self, version: int, recompute: bool) -> None:
        self._model.check_fused()
        self._cache.forget(version)
        if recompute:
            self._scheduler.start_over()
        self._weights_changed = True

    def _await_end_of_step(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: not self._stepping, _STEP_DEADLINE_S):
                raise DeadlineError(
                    f"the embedded engine did not pause within {_STEP_DEADLINE_S:.0f} s: its step did not end"
                )

    # ---- the engine thread

    def _serve(self) -> None:
        if self._threads:
            use_threads(self._threads)
        while self._await_work():
            if self._work:
                self._forward.release()  # the work may be the trainer's, which needs the memory
                self._weights_changed = True
                self._work.popleft()()
                continue
            try:
                with torch.inference_mode():
                    self._step()
            except Exception as error:
                self._failed_steps += 1
                _log.exception("step %d of the embedded engine failed", self._steps)
                self._abandon(f"the embedded engine failed: {error}", error)
        self._abandon("the embedded engine was stopped")

    def _await_work(self) -> bool:
        """Blocks while there is nothing to do: idling waits for nobody in particular and so has no deadline."""
        with self._changed:
            self._stepping = False
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: (
                    self._stopping or self._work or (not self._pauses and (self._arrived or self._scheduler.has_work))
                )
            )
            self._stepping = not self._stopping
            return self._stepping

    def _step(self) -> None:
        if self._weights_changed:
            self._forward.refresh()
            self._weights_changed = False
        batch = self._scheduler.schedule(self._take_arrived())
        if batch:
            self._postprocess(batch, self._run(batch))

    def _take_arrived(self) -> list[Sequence]:
        with self._changed:
            arrived, self._arrived = self._arrived, []
        return arrived

    def _run(self, batch: Batch) -> list[GenerationChunk]:
        """What each of `batch.sampling` gets; how it ends is not known yet."""
        logits = self._forward.logits(batch)
        if not batch.sampling:
            return []
        uniforms = [sequence.random.random() for sequence in batch.sampling]
        params = [sequence.params for sequence in batch.sampling]
        token_ids, logprobs, kept_ids = sample(logits, params, uniforms)
        if not np.isfinite(logprobs).all():
            raise EngineError("the model's logits are not finite; the weights may have diverged")
        return [
            GenerationChunk((token_id,), (logprob,), (self.version,), kept_ids=(kept,) if asked.list_kept else ())
            for token_id, logprob, kept, asked in zip(token_ids, logprobs, kept_ids, params, strict=True)
        ]

    def _postprocess(self, batch: Batch, sampled: list[GenerationChunk]) -> None:
        self._scheduler.advance(batch)
        deliveries: list[tuple[Sequence, Delivery]] = []
        for sequence, chunk in zip(batch.sampling, sampled, strict=True):
            (token_id,) = chunk.token_ids
            self._cache.append(sequence.slot, token_id)
            reason = sequence.accept(token_id)
            routes, prompt_routes = self._routes(sequence)
            chunk = replace(chunk, finish_reason=reason, routes=routes, prompt_routes=prompt_routes)
            deliveries.append((sequence, chunk))
            if reason is not None:
                self._scheduler.finish(sequence)
        self._steps += 1
        self._sampled_tokens += len(sampled)
        self._prefilled_tokens += sum(chunk.count for chunk in batch.chunks)
        self._send(deliveries)

    def _routes(self, sequence: Sequence) -> tuple[NDArray[np.int16] | None, NDArray[np.int16] | None]:
        """Of the token that was sampled last, and with the first one of its prompt; see GenerationChunk."""
        if self._cache.routes is None:
            return None, None
        last = len(sequence.prompt_ids) + sequence.sampled - 2
        held = self._cache.routes[sequence.slot]
        return held[last : last + 1].copy(), held[:last].copy() if sequence.sampled == 1 else None

    def _abandon(self, message: str, cause: Exception | None = None) -> None:
        """Every open request gets an EngineError; then the cache is emptied, since what it holds is in doubt."""
        deliveries = []
        for sequence in self._scheduler.abandon() + self._take_arrived():
            error = EngineError(message)
            error.__cause__ = cause
            deliveries.append((sequence, error))
        self._send(deliveries)
        self._cache.clear()

    def _send(self, deliveries: list[tuple[Sequence, Delivery]]) -> None:
        assert self._loop is not None
        # One call for all of a step: waking the loop costs more than what it does there.
        if deliveries and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, deliveries)


def _route_shape(model: LoadedModel) -> tuple[int, int]:
    """How many layers have experts, and how many experts a token goes to."""
    layers = expert_layers(model.module)
    if not layers:
        raise ConfigError(
            'engine.routes = "replay", but the model has no experts; drop this key or choose a mixture of experts'
        )
    return len(layers), layers[0].mlp.gate.top_k


def _settle(outcome: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if outcome.done():  # its caller was cancelled
        return
    if error is None:
        outcome.set_result(result)
    else:
        outcome.set_exception(error)


def _deliver(deliveries: list[tuple[Sequence, Delivery]]) -> None:
    for sequence, item in deliveries:
        sequence.deliveries.put_nowait(item)
