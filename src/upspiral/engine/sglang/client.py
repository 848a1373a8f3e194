"""The client of SGLang's own API. It has not been run with the real server: tests/fixtures/sglang_contract.py plays it,
as its sources describe it (docs/design/012-sglang.md).

Versions: SGLang has one label for its weights and puts it on what it sends. Where a request is under way while they
change, nothing says which of its tokens were sampled before. So none is: a switch ends all requests, their tokens are
delivered, and each goes on behind them as a new request, which would have had to compute its prefix again anyway.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds
from upspiral.engine.http import TOKEN_DEADLINE_S, Server
from upspiral.engine.routed_layers import RoutedLayers
from upspiral.engine.sglang.wire import Piece, Reader, request
from upspiral.errors import (
    ContextLengthError,
    DeadlineError,
    EngineError,
    RequestError,
    StaleBaseError,
    UnknownWeightsError,
)
from upspiral.types import FinishReason, SamplingParams
from upspiral.weights.publication import Publication

UPDATE_DEADLINE_S = 600.0
_HALF_PRECISION_TOLERANCE = 0.25
_log = logging.getLogger(__name__)


class SglangEngine:
    """See `UpdatableEngine`. The server must see the folders that are published.

    A publication that is a difference raises StaleBaseError: SGLang loads whole ones. Raises RequestError for top-p,
    top-k and min-p where the server gives no log-probabilities of what they leave.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        probe_tolerance: float = _HALF_PRECISION_TOLERANCE,
        version: int | None = 0,
        routes: RoutedLayers | None = None,
    ) -> None:
        """`probe_tolerance`: how far log-probabilities may be, on average, from those that a publication's probe has.
        `version`: of the weights that the server has; None: they are somebody else's to change. Such a server is told
        nothing, and all its tokens are of version 0. `routes`: asks which experts computed each token. It needs a
        server with --enable-return-routed-experts, which tells it when a request ends: all its tokens come at once."""
        self._server = Server(url, key=key)
        self._tolerance = probe_tolerance
        self._version, self._ours = version or 0, version is not None
        self._routes = routes
        self._context_length = 0
        self._open = asyncio.Event()
        """Cleared while the server is paused: generations wait."""
        self._open.set()
        self._switch = asyncio.Lock()
        self._switches = self._pauses = 0
        self._released: list[str] = []
        """What of its memory the server has not."""
        self._doubt = ""
        """Why nobody knows which weights the server has; until it has adopted some, generations fail."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = self._sampled = self._prefilled = self._reused = self._probed = 0
        self._mismatch = 0.0

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def version(self) -> int:
        return self._version

    def stats(self) -> EngineStats:
        """Tokens that arrived here; what the server sampled for readers who had gone is not among them."""
        extra = {"probes": float(self._probed), "probe_mismatch": self._mismatch}
        return EngineStats(
            running=self._running, sampled_tokens=self._sampled, prefilled_tokens=self._prefilled,
            reused_tokens=self._reused, extra=extra,
        )  # fmt: skip

    async def start(self) -> None:
        """Raises EngineError when the server does not answer, or does not describe a model."""
        _, self._context_length = await self._server.served_model()
        if self._ours:
            await self._server.post("/update_weight_version", {"new_version": str(self._version)})

    async def stop(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.close()

    # ---- generating

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        prompt, sampled = [int(token_id) for token_id in prompt_ids], list[int]()
        self._check(prompt, params)
        self._running += 1
        try:
            while True:
                await self._opened()
                async with aclosing(self._requested(prompt, sampled, params)) as chunks:
                    async for chunk in chunks:
                        sampled += chunk.token_ids
                        yield chunk
                        if chunk.finish_reason is not None:
                            return
        finally:
            self._running -= 1

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        if self._context_length and len(prompt) >= self._context_length:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, but prompt and completion together may have "
                f"{self._context_length}; shorten the prompt or start SGLang with a larger --context-length"
            )
        if not prompt or params.max_tokens < 1:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens with max_tokens = {params.max_tokens}: both must be at least 1"
            )

    async def _opened(self) -> None:
        try:
            await asyncio.wait_for(self._open.wait(), TOKEN_DEADLINE_S)
        except TimeoutError:
            raise DeadlineError(f"{self._server.url} was paused for {TOKEN_DEADLINE_S:.0f} s") from None
        if self._doubt:
            raise UnknownWeightsError(f"nobody knows which weights it has: {self._doubt}")

    async def _requested(
        self, prompt: Sequence[int], sampled: Sequence[int], params: SamplingParams
    ) -> AsyncGenerator[GenerationChunk]:
        """What one request adds to the tokens sampled so far. It may end before the generation does: with a switch of
        weights, or behind a token that the model ends with and this generation does not."""
        request_id, reader = uuid.uuid4().hex, Reader(params, self._routes)
        ids, begun, version = [*prompt, *sampled], self._switches, self._version
        left = min(params.max_tokens, self._context_length - len(prompt)) - len(sampled)
        body = request(request_id, ids, params, left, routes=self._routes is not None)
        pieces: list[Piece] = []
        """That wait for their routes."""
        ended = False
        try:
            async with aclosing(self._server.lines("/generate", body)) as events:
                async for event in events:
                    piece = reader.read(event)
                    ended = bool(piece.ended)
                    if piece.ended == "abort" and begun == self._switches:
                        raise EngineError(f"{self._server.url} ended a generation: {piece.why or 'it was aborted'}")
                    left -= len(piece.token_ids)
                    pieces.append(piece)
                    if ended:
                        self._reused += piece.reused
                        self._prefilled += len(ids) - piece.reused
                    if self._routes is None or ended:
                        yield self._chunk(pieces, version, _finish(piece, params, left), len(ids), first=not sampled)
                        pieces.clear()
                    else:
                        yield GenerationChunk()
                    if ended:
                        return
            raise EngineError(f"{self._server.url} ended a generation without saying why")
        finally:
            if not ended:
                self._spawn(self._abort(request_id))

    def _chunk(
        self, pieces: Sequence[Piece], begun: int, finish: FinishReason | None, prompt_tokens: int, *, first: bool
    ) -> GenerationChunk:
        token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
        versions = [self._labelled(piece, begun) for piece in pieces for _ in piece.token_ids]
        self._sampled += len(token_ids)
        routes = pieces[-1].routes
        return GenerationChunk(
            token_ids,
            [logprob for piece in pieces for logprob in piece.logprobs],
            versions,
            finish,
            routes=routes[prompt_tokens - 1 :] if routes is not None else None,
            prompt_routes=routes[: prompt_tokens - 1] if routes is not None and first else None,
            kept_ids=[kept for piece in pieces for kept in piece.kept_ids],
        )

    def _labelled(self, piece: Piece, begun: int) -> int:
        """The version of a piece: not older than the weights when its request began, nor newer than they are now."""
        if not self._ours:
            return 0
        label = str(piece.label)
        if not label.isdecimal() or not min(begun, self._version) <= int(label) <= max(begun, self._version):
            self._doubt = (
                f"{self._server.url} labels tokens with weight version {label!r}, but should have {self._version}: it "
                "was started again, somebody else changes its weights, or it has several tokenizer workers"
            )
            raise UnknownWeightsError(self._doubt)
        return int(label)

    async def _abort(self, request_id: str) -> None:
        with suppress(EngineError, RequestError, DeadlineError):
            await self._server.post("/abort_request", {"rid": request_id})

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- weights

    async def update_weights(self, publication: Publication) -> None:
        async with self._switch:
            if publication.version == self._version and not self._released and not self._doubt:
                return
            if publication.base is not None:
                raise StaleBaseError(
                    f"SGLang loads whole publications, and version {publication.version} is a difference to "
                    f'{publication.base}; set weights.form = "full"'
                )
            await self._hold()
            self._doubt = f"{self._server.url} did not say that it adopted version {publication.version}"
            try:
                await self._resumed("weights")
                await self._adopt(publication)
                await self._resumed("kv_cache")
                await self._go_on()
                await self._probe(publication)
                self._doubt = ""
            except BaseException as error:
                if isinstance(error, EngineError):
                    self._doubt = str(error)
                with suppress(EngineError, DeadlineError):
                    await self._go_on()
                raise
            finally:
                self._let_in()

    async def sleep(self) -> None:
        """See UpdatableEngine. The server must run with --enable-memory-saver."""
        async with self._switch:
            if self._released:
                return
            await self._hold()
            tags = ["kv_cache", "weights"]
            try:
                await self._server.post("/release_memory_occupation", {"tags": tags}, deadline_s=UPDATE_DEADLINE_S)
            except BaseException as error:
                self._doubt = f"{self._server.url} did not say that it gave its memory up: {error!r}"
                self._let_in()
                raise
            self._released = tags

    async def _resumed(self, tag: str) -> None:
        """SGLang ends when it is told to resume what it did not release."""
        if tag in self._released:
            await self._server.post("/resume_memory_occupation", {"tags": [tag]}, deadline_s=UPDATE_DEADLINE_S)
            self._released.remove(tag)

    async def _adopt(self, publication: Publication) -> None:
        body = {
            "model_path": str(publication.folder.resolve()),
            "weight_version": str(publication.version),
            "flush_cache": True,
        }
        failed = f"{self._server.url} could not adopt version {publication.version}"
        try:
            answer = await self._server.post("/update_weights_from_disk", body, deadline_s=UPDATE_DEADLINE_S)
        except RequestError as error:  # it answers 400 for whatever went wrong
            raise EngineError(f"{failed}: {error}") from error
        if not isinstance(answer, dict) or not answer.get("success"):
            raise EngineError(f"{failed}: {answer}")
        self._version = publication.version

    async def _probe(self, publication: Publication) -> None:
        """Raises EngineError when the server's log-probabilities are not those of the new weights."""
        from upspiral.weights.receiver import Damaged, read_probe  # it needs torch, which the base install lacks

        try:
            probe = read_probe(Path(publication.folder))
        except Damaged as error:
            raise EngineError(str(error)) from error
        if probe is None or self._pauses:
            return
        answer = await self._server.post("/generate", {
            "input_ids": probe["token_ids"], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True, "logprob_start_len": 0,
        })  # fmt: skip
        found = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        self._mismatch = float(np.mean(np.abs(np.array(found, float) - np.array(probe["logprobs"]))))
        self._probed += 1
        if not self._mismatch <= self._tolerance:
            raise EngineError(
                f"{self._server.url} answers as if it had not adopted version {publication.version}: its "
                f"log-probabilities are {self._mismatch:.3g} off on average, more than {self._tolerance:g}"
            )

    async def pause(self) -> None:
        async with self._switch:
            await self._hold()
            self._pauses += 1

    def resume(self) -> None:
        assert self._pauses > 0, "resume() without pause()"
        self._pauses -= 1
        self._spawn(self._resume())

    async def _resume(self) -> None:
        async with self._switch:
            try:
                if not self._released:
                    await self._go_on()
            except (EngineError, DeadlineError) as error:  # nobody waits for this; generations will find it out
                _log.warning("%s does not go on: %s", self._server.url, error)
            self._let_in()

    async def _hold(self) -> None:
        """Ends all requests. The server answers when the last of them has its tokens."""
        self._switches += 1
        self._open.clear()
        try:
            await self._server.post("/pause_generation", {"mode": "abort"}, deadline_s=UPDATE_DEADLINE_S)
        except BaseException:
            self._let_in()
            raise

    async def _go_on(self) -> None:
        if not self._pauses:
            await self._server.post("/continue_generation")

    def _let_in(self) -> None:
        """Generations, unless they have to wait; where the server has failed, they are told so."""
        if not self._pauses and (not self._released or self._doubt):
            self._open.set()


def _finish(piece: Piece, params: SamplingParams, left: int) -> FinishReason | None:
    if not piece.ended:
        return None
    if piece.token_ids and piece.token_ids[-1] in params.stop_token_ids:
        return "stop"
    return "length" if piece.ended == "length" or left <= 0 else None
