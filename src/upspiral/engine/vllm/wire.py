"""What vLLM's token-in token-out endpoint sends, checked: an answer that is none of its documented ones is an
EngineError, never a token with a wrong log-probability or version."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upspiral.engine.base import GenerationChunk
from upspiral.errors import EngineError, RequestError
from upspiral.types import FinishReason

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
_ABSENT = -9999.0
"""What vLLM sends where it has no log-probability."""
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One chunk of a stream."""

    token_ids: list[int]
    logprobs: list[float]
    kept_ids: list[NDArray[np.int32] | None]
    """As `GenerationChunk`'s; empty where the server sends no masks."""
    finish_reason: FinishReason | None
    labels: list[str] | None
    """With the last one: the label that the server's weights had, of every token of the generation."""
    routes: NDArray[np.int16] | None
    """With the last one, if the server sends them: of every token of prompt and answer but the last, the experts that
    computed it."""

    def chunk(self, versions: Sequence[int]) -> GenerationChunk:
        return GenerationChunk(self.token_ids, self.logprobs, versions, self.finish_reason, kept_ids=self.kept_ids)


def read_piece(line: Any, *, labelled: bool = True) -> Piece:
    """`labelled`: whether the labels are ours; others are not read. Raises RequestError for a refusal,
    EngineError for a failure and for what is no chunk of a generation."""
    if isinstance(line, dict) and "error" in line:
        _raise_error(line["error"])
    try:
        choice = line["choices"][0]
        reason = choice["finish_reason"]
        token_ids = [_token_id(each) for each in choice["token_ids"] or ()]
        piece = Piece(
            token_ids,
            _logprobs(choice, token_ids),
            [np.sort(np.asarray(ids, np.int32)) if ids else None for ids in choice.get("sampling_mask") or ()],
            None if reason is None else _FINISH.get(reason),
            _labels(choice.get("weight_versions")) if labelled else None,
            _routes(choice.get("routed_experts")),
        )
    except _MALFORMED as error:
        raise EngineError(f"vLLM sent what is no chunk of a generation ({error!r}): {str(line)[:500]}") from error
    if reason is not None and piece.finish_reason is None:
        raise EngineError(f"vLLM ended a generation with reason {reason!r}")
    return piece


def _raise_error(error: Any) -> None:
    said, code = (error.get("message"), error.get("code")) if isinstance(error, dict) else (error, None)
    if code in (400, 422):
        raise RequestError(f"vLLM refuses a generation: {said}")
    raise EngineError(f"vLLM failed a generation: {said}")


def _token_id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no token id")
    return value


def _logprobs(choice: dict[str, Any], token_ids: Sequence[int]) -> list[float]:
    entries = choice["logprobs"]["content"] if token_ids else []
    if [entry["token_id"] for entry in entries] != token_ids:
        raise ValueError("its log-probabilities are not those of its tokens")
    logprobs = [float(entry["logprob"]) for entry in entries]
    if any(value == _ABSENT or not math.isfinite(value) for value in logprobs):
        raise ValueError("a log-probability is missing")
    return logprobs


def _labels(spans: Any) -> list[str] | None:
    if spans is None:
        return None
    labels: list[str] = []
    for span in spans:
        if span["start"] != len(labels) or span["end"] < span["start"]:
            raise ValueError("its spans of versions have holes")
        labels += [str(span["version"])] * (span["end"] - span["start"])
    return labels


def _routes(encoded: str | None) -> NDArray[np.int16] | None:
    if encoded is None:
        return None
    routes = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
    if routes.ndim != 3:
        raise ValueError(f"its routed experts have shape {routes.shape}")
    return routes.astype(np.int16)


def with_versions(pieces: Sequence[Piece], versions: Sequence[int] | None) -> list[GenerationChunk]:
    """Pieces that were held back until the versions of their generation's tokens were known; they are its end."""
    count = sum(len(piece.token_ids) for piece in pieces)
    if versions is None or len(versions) < count:
        given = "no" if versions is None else len(versions)
        raise EngineError(f"vLLM labelled {given} tokens of a generation with versions; {count} were held back")
    at, chunks = len(versions) - count, []
    for piece in pieces:
        chunks.append(piece.chunk(versions[at : at + len(piece.token_ids)]))
        at += len(piece.token_ids)
    return chunks


def probed_logprobs(answer: Any, token_ids: Sequence[int]) -> NDArray[np.float64]:
    """Of all tokens of a prompt but the first. Raises EngineError."""
    try:
        entries = answer["prompt_logprobs"][1:]
        found = [float(entry[str(token)]["logprob"]) for entry, token in zip(entries, token_ids[1:], strict=True)]
    except _MALFORMED as error:
        raise EngineError(f"vLLM sent no log-probabilities of a prompt ({error!r}): {str(answer)[:500]}") from error
    return np.array(found)
