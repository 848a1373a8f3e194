"""The frames between a served engine and its client: msgpack behind four bytes of length.

Between processes of one run, which prove to each other that they have its key; the sizes are bounded all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from upspiral.engine.base import EngineStats, GenerationChunk
from upspiral.errors import (
    ContextLengthError,
    DeadlineError,
    EngineError,
    EngineGoneError,
    RequestError,
    StaleBaseError,
    UnknownWeightsError,
    UpspiralError,
)
from upspiral.types import FinishReason, SamplingParams
from upspiral.weights.publication import Publication

MAX_FRAME_BYTES = 256 << 20
"""Routed experts of a long prompt are the largest."""


class Hello(msgspec.Struct, tag=True, array_like=True):
    """The client's first."""

    key: str


class Generate(msgspec.Struct, tag=True, array_like=True):
    id: int
    prompt_ids: bytes
    """int32"""
    params: SamplingParams


class Cancel(msgspec.Struct, tag=True, array_like=True):
    id: int


class Update(msgspec.Struct, tag=True, array_like=True):
    id: int
    folder: str
    version: int
    base: int | None
    num_bytes: int


class Sleep(msgspec.Struct, tag=True, array_like=True):
    id: int


class Pause(msgspec.Struct, tag=True, array_like=True):
    id: int


class Resume(msgspec.Struct, tag=True, array_like=True):
    id: int


Request = Hello | Generate | Cancel | Update | Sleep | Pause | Resume


class State(msgspec.Struct, tag=True, array_like=True):
    """What the engine's properties say; before everything that may have changed them."""

    version: int
    context_length: int
    running: int
    waiting: int
    sampled_tokens: int
    prefilled_tokens: int
    reused_tokens: int
    extra: Mapping[str, float]

    def stats(self) -> EngineStats:
        counts = self.sampled_tokens, self.prefilled_tokens, self.reused_tokens
        return EngineStats(self.running, self.waiting, *counts, extra=self.extra)


class Array(msgspec.Struct, array_like=True):
    shape: tuple[int, ...]
    data: bytes
    """int16"""


class Chunk(msgspec.Struct, tag=True, array_like=True):
    id: int
    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: FinishReason | None
    routes: Array | None
    prompt_routes: Array | None
    kept_ids: list[bytes | None]
    """int32"""


class Done(msgspec.Struct, tag=True, array_like=True):
    """Of an update, a sleep or a pause."""

    id: int


class Failed(msgspec.Struct, tag=True, array_like=True):
    id: int
    kind: str
    message: str


Answer = State | Chunk | Done | Failed

_ERRORS: Mapping[str, Callable[[str], UpspiralError]] = {
    kind.__name__: kind
    for kind in (
        ContextLengthError,
        RequestError,
        StaleBaseError,
        UnknownWeightsError,
        EngineGoneError,
        DeadlineError,
        EngineError,
    )
}


def failed(number: int, error: Exception) -> Failed:
    kind = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS), "EngineError")
    return Failed(number, kind, str(error) or repr(error))


def error_of(frame: Failed) -> UpspiralError:
    return _ERRORS.get(frame.kind, EngineError)(frame.message)


def chunk_frame(number: int, chunk: GenerationChunk) -> Chunk:
    return Chunk(
        number,
        [int(token_id) for token_id in chunk.token_ids],
        [float(logprob) for logprob in chunk.logprobs],
        [int(version) for version in chunk.versions],
        chunk.finish_reason,
        _packed(chunk.routes),
        _packed(chunk.prompt_routes),
        [None if kept is None else np.asarray(kept, np.int32).tobytes() for kept in chunk.kept_ids],
    )


def chunk_of(frame: Chunk) -> GenerationChunk:
    return GenerationChunk(
        frame.token_ids,
        frame.logprobs,
        frame.versions,
        frame.finish_reason,
        _unpacked(frame.routes),
        _unpacked(frame.prompt_routes),
        [None if kept is None else np.frombuffer(kept, np.int32) for kept in frame.kept_ids],
    )


def publication_of(frame: Update) -> Publication:
    return Publication(Path(frame.folder), frame.version, frame.base, frame.num_bytes)


def _packed(array: NDArray[np.int16] | None) -> Array | None:
    return None if array is None else Array(array.shape, np.ascontiguousarray(array, np.int16).tobytes())


def _unpacked(array: Array | None) -> NDArray[np.int16] | None:
    return None if array is None else np.frombuffer(array.data, np.int16).reshape(array.shape)


class Frames:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reads: Any) -> None:
        """`reads`: the union of frames that the other end sends."""
        self._reader, self._writer = reader, writer
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(reads)

    def send(self, frame: Request | Answer) -> None:
        """Hands the frame over; `drain` waits until the other end takes some."""
        body = self._encoder.encode(frame)
        self._writer.write(len(body).to_bytes(4, "big") + body)

    async def drain(self) -> None:
        await self._writer.drain()

    async def receive(self) -> Any:
        """Raises EOFError at the end of the connection, or when what comes is no frame."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            if size > MAX_FRAME_BYTES:
                raise EOFError(f"a frame of {size:,} bytes is no frame of ours")
            return self._decoder.decode(await self._reader.readexactly(size))
        except (OSError, asyncio.IncompleteReadError, msgspec.DecodeError) as error:
            raise EOFError(str(error)) from error

    def close(self) -> None:
        self._writer.close()
