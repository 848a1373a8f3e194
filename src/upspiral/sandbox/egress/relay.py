"""Bytes between a client and a destination, counted and limited."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from dataclasses import dataclass

from upspiral.sandbox.egress.head import Framing, Request, parse_response

CHUNK_BYTES = 64 * 1024
_CHUNK_LINE_BYTES = 256
_LARGEST_CHUNK_BYTES = 1 << 40


class CutOff(Exception):
    """The connection is ended here; its text says why."""


class HeadTooLong(CutOff):
    """It has no end within the limit."""


@dataclass(frozen=True, slots=True)
class Ends:
    """Both ends of a connection."""

    client: tuple[StreamReader, StreamWriter]
    upstream: tuple[StreamReader, StreamWriter]


@dataclass(slots=True)
class Traffic:
    """What went through a connection. `moved` hears of each piece and may raise CutOff."""

    moved: Callable[[int], None]
    sent_bytes: int = 0
    received_bytes: int = 0

    def sent(self, count: int) -> None:
        self.sent_bytes += count
        self.moved(count)

    def received(self, count: int) -> None:
        self.received_bytes += count
        self.moved(count)


async def tunnel(ends: Ends, traffic: Traffic) -> None:
    """Both ways until both have ended. The end of one way is passed on, and the other goes on."""
    client_reader, client_writer = ends.client
    upstream_reader, upstream_writer = ends.upstream
    there = asyncio.create_task(_copy_to_end(client_reader, upstream_writer, traffic.sent))
    back = asyncio.create_task(_copy_to_end(upstream_reader, client_writer, traffic.received))
    try:
        await asyncio.gather(there, back)
        await _flush(client_writer, upstream_writer)
    finally:
        await _cancel(there, back)


async def exchange(request: Request, ends: Ends, traffic: Traffic) -> None:
    """One request and its answer. A destination that answers before it has read the whole request is not waited for."""
    client_reader, _ = ends.client
    _, upstream_writer = ends.upstream
    await _send(upstream_writer, request.forwarded_head(), traffic.sent)
    sending = asyncio.create_task(_send_body(client_reader, upstream_writer, request.framing, traffic))
    answering = asyncio.create_task(_copy_answer(request.method, ends, traffic))
    try:
        await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            sending.result()  # a body that breaks off or breaks the rules ends the exchange
        await answering
        await _flush(ends.client[1])
    finally:
        await _cancel(sending, answering)


async def _flush(*writers: StreamWriter) -> None:
    """Until the system has taken everything."""
    for writer in writers:
        writer.close()
    for writer in writers:
        await writer.wait_closed()


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _send_body(reader: StreamReader, writer: StreamWriter, framing: Framing, traffic: Traffic) -> None:
    # A destination may stop reading and answer all the same; what it answers counts then.
    with contextlib.suppress(ConnectionError):
        await _copy_body(reader, writer, framing, traffic.sent)


async def _copy_answer(method: str, ends: Ends, traffic: Traffic) -> None:
    reader, _ = ends.upstream
    _, writer = ends.client
    while True:
        response = parse_response(await read_head(reader), method=method)
        await _send(writer, response.forwarded_head(), traffic.received)
        if not response.is_interim:
            break
    await _copy_body(reader, writer, response.framing, traffic.received)


async def read_head(reader: StreamReader) -> bytes:
    """To the empty line. Raises CutOff when the stream ends before it, HeadTooLong beyond the reader's limit."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise HeadTooLong("the head is too long") from None
    except asyncio.IncompleteReadError as error:
        raise CutOff("the connection ended within a head" if error.partial else "") from None


async def _copy_body(
    reader: StreamReader, writer: StreamWriter, framing: Framing, count: Callable[[int], None]
) -> None:
    if framing == "until end":
        await _copy_to_end(reader, writer, count)
    elif framing == "chunked":
        await _copy_chunks(reader, writer, count)
    else:
        await _copy_exactly(reader, writer, framing, count)


async def _copy_to_end(reader: StreamReader, writer: StreamWriter, count: Callable[[int], None]) -> None:
    while piece := await reader.read(CHUNK_BYTES):
        await _send(writer, piece, count)
    with contextlib.suppress(OSError):  # the other end is gone already
        writer.write_eof()


async def _copy_exactly(reader: StreamReader, writer: StreamWriter, size: int, count: Callable[[int], None]) -> None:
    while size:
        piece = await reader.read(min(size, CHUNK_BYTES))
        if not piece:
            raise CutOff(f"the connection ended {size} bytes before the end of a body")
        size -= len(piece)
        await _send(writer, piece, count)


async def _copy_chunks(reader: StreamReader, writer: StreamWriter, count: Callable[[int], None]) -> None:
    """Chunk by chunk, without what may stand beside their sizes and without trailers."""
    while size := _chunk_size(await _line(reader)):
        await _send(writer, b"%x\r\n" % size, count)
        await _copy_exactly(reader, writer, size, count)
        if await _line(reader):
            raise CutOff("a chunk is longer than its size")
        await _send(writer, b"\r\n", count)
    while await _line(reader):
        pass
    await _send(writer, b"0\r\n\r\n", count)


async def _line(reader: StreamReader) -> bytes:
    try:
        line = await reader.readuntil(b"\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        raise CutOff("the connection ended within the chunks of a body") from None
    return line[:-2]


def _chunk_size(line: bytes) -> int:
    digits = line[:_CHUNK_LINE_BYTES].partition(b";")[0].strip(b" \t")
    if not digits or digits.strip(b"0123456789abcdefABCDEF") or (size := int(digits, 16)) > _LARGEST_CHUNK_BYTES:
        raise CutOff("a chunk's size is no number")
    return size


async def _send(writer: StreamWriter, content: bytes, count: Callable[[int], None]) -> None:
    count(len(content))
    writer.write(content)
    await writer.drain()
