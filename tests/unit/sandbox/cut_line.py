"""A TCP proxy on loopback whose connections can be cut, as networks do it: without a word, in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit


class CutLine:
    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._writers: set[asyncio.StreamWriter] = set()
        self.url = ""
        self.cuts = 0
        self.is_down = False
        """New connections are cut at once."""
        self.mute_upgrades = 0
        """So many WebSockets are cut as soon as they stand, before a word is said."""

    def cut(self) -> None:
        """All connections that stand."""
        self.cuts += len(self._writers) // 2
        for writer in self._writers:
            writer.transport.abort()

    async def cut_every(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            self.cut()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_down:
            writer.transport.abort()
            return
        other_reader, other_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, other_writer}
        try:
            await asyncio.gather(_copy(reader, other_writer), _copy(other_reader, writer, self._passed))
        finally:
            self._writers -= {writer, other_writer}
            writer.close()
            other_writer.close()

    def _passed(self, content: bytes) -> tuple[bytes, bool]:
        """How much of it, and whether more may follow."""
        if not (self.mute_upgrades and content.startswith(b"HTTP/1.1 101")):
            return content, True
        self.mute_upgrades -= 1
        head, end, _ = content.partition(b"\r\n\r\n")
        return head + end, False


def _all(content: bytes) -> tuple[bytes, bool]:
    return content, True


async def _copy(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    passed: Callable[[bytes], tuple[bytes, bool]] = _all,
) -> None:
    goes_on = True
    with suppress(OSError):
        while goes_on and (content := await reader.read(1 << 16)):
            content, goes_on = passed(content)
            writer.write(content)
            await writer.drain()
    writer.transport.abort()


@asynccontextmanager
async def cut_line(url: str) -> AsyncIterator[CutLine]:
    """A line to the server at `url`."""
    address = urlsplit(url)
    assert address.hostname and address.port
    line = CutLine(address.hostname, address.port)
    server = await asyncio.start_server(line.serve, "127.0.0.1", 0)
    line.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield line
    finally:
        line.is_down = True
        line.cut()
        server.close()
