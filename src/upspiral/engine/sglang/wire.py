"""What SGLang's `/generate` is asked, and what its events say. docs/design/012-sglang.md names the sources."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upspiral.engine.routed_layers import RoutedLayers
from upspiral.errors import ContextLengthError, EngineError, RequestError
from upspiral.types import SamplingParams

_ENDINGS = ("stop", "length", "abort")
_BAD_REQUEST = 400


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to those before it. The lists are as in GenerationChunk."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    kept_ids: Sequence[NDArray[np.int32] | None]
    label: Any
    """The server's name for its weights."""
    ended: str
    """"": not yet; "stop", "length", or "abort": somebody ended it."""
    why: str
    """Of an abort."""
    reused: int
    """Tokens of the prompt that the prefix cache had."""
    routes: NDArray[np.int16] | None
    """[prompt + tokens - 1, layers with experts, experts of a token]"""


def is_filtered(params: SamplingParams) -> bool:
    """Whether it is not the whole vocabulary that is sampled from."""
    return params.temperature > 0 and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)


def request(
    request_id: str, token_ids: Sequence[int], params: SamplingParams, max_tokens: int, *, routes: bool
) -> dict[str, Any]:
    """The body of a streamed request."""
    sampling: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": params.min_p,
        "stop_token_ids": list(params.stop_token_ids),
        # It would switch `stop_token_ids` off as well.
        "ignore_eos": not params.stop_token_ids,
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    if params.seed is not None:
        sampling["sampling_seed"] = params.seed
    body: dict[str, Any] = {
        "rid": request_id,
        "input_ids": list(token_ids),
        "sampling_params": sampling,
        "return_logprob": True,
        "stream": True,
    }
    if is_filtered(params):
        body["return_sampling_mask"] = True
    if routes:
        body["return_routed_experts"] = True
    return body


class Reader:
    """Of the events of one request. Each has all tokens so far, or only the new ones where the server runs with
    --incremental-streaming-output; how many there are so far is in both."""

    def __init__(self, params: SamplingParams, routes: RoutedLayers | None) -> None:
        self._params, self._routes = params, routes
        self._count = 0

    def read(self, event: Any) -> Piece:
        """Raises RequestError when the server refuses the request, EngineError for what is no event of a generation."""
        try:
            if "error" in event:
                raise refusal(str(event["error"].get("message", event["error"])))
            return self._piece(event["meta_info"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise EngineError(
                f"SGLang sent what is no event of a generation ({error!r}): {str(event)[:500]}"
            ) from error

    def _piece(self, meta: dict[str, Any]) -> Piece:
        ended, why = _ending(meta.get("finish_reason"))
        total = meta.get("completion_tokens", self._count)
        entries = self._new(meta, "output_token_logprobs", total)
        token_ids = [int(entry[1]) for entry in entries]
        logprobs, kept = [float(entry[0]) for entry in entries], list[NDArray[np.int32] | None]()
        if is_filtered(self._params) and entries:
            logprobs = self._filtered_logprobs(meta, total)
        if self._params.list_kept:
            kept = self._kept(meta, total) if is_filtered(self._params) else [None] * len(token_ids)
        if not all(map(math.isfinite, logprobs)):
            raise EngineError(f"SGLang sent the log-probabilities {logprobs}")
        self._count = total
        return Piece(
            token_ids, logprobs, kept, meta.get("weight_version"), ended, why, int(meta.get("cached_tokens") or 0),
            self._experts(meta),
        )  # fmt: skip

    def _new(self, meta: dict[str, Any], name: str, total: int) -> Sequence[Any]:
        entries = meta.get(name) or ()
        if len(entries) >= total:
            return entries[self._count : total]
        if len(entries) != total - self._count:
            raise EngineError(f"SGLang sent {len(entries)} {name} for token {self._count + 1} to {total}")
        return entries

    def _filtered_logprobs(self, meta: dict[str, Any], total: int) -> list[float]:
        """The plain ones are of the distribution before the filters."""
        if "output_token_sampling_logprobs" not in meta:
            raise RequestError(
                "this SGLang server has no log-probabilities for top_p, top_k and min_p (return_sampling_mask): sample "
                "without them, or use a newer server"
            )
        return [float(each) for each in self._new(meta, "output_token_sampling_logprobs", total)]

    def _kept(self, meta: dict[str, Any], total: int) -> list[NDArray[np.int32] | None]:
        return [np.sort(np.asarray(ids, np.int32)) for ids in self._new(meta, "output_token_sampling_mask", total)]

    def _experts(self, meta: dict[str, Any]) -> NDArray[np.int16] | None:
        encoded = meta.get("routed_experts")
        if self._routes is None or encoded is None:
            return None
        flat = np.frombuffer(base64.b64decode(encoded), np.dtype(meta.get("routed_experts_dtype") or "int32"))
        every_layer = flat.reshape(-1, self._routes.layers, self._routes.experts_of_token)
        return every_layer[:, list(self._routes.with_experts)].astype(np.int16)


def refusal(message: str) -> RequestError:
    """What the server said of a request that it does not take."""
    kind = ContextLengthError if "context length" in message else RequestError
    return kind(f"SGLang refuses a generation: {message}")


def _ending(reason: Any) -> tuple[str, str]:
    if reason is None:
        return "", ""
    ended, said = reason["type"], str(reason.get("message", ""))
    if ended == "abort" and reason.get("status_code") == _BAD_REQUEST:
        raise refusal(said)
    # A text that we did not give is how it tells that logits were not finite; it then puts a stop token in their place.
    if ended not in _ENDINGS or isinstance(reason.get("matched"), str):
        raise EngineError(f"SGLang ended a generation with {reason}")
    return ended, said
