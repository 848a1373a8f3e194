"""What a client may take of the server: sizes, numbers and time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from upspiral.errors import RequestError
from upspiral.gateway.http import serve_app
from upspiral.gateway.limits import Limits

DEADLINE_S = 10.0
LARGE = 20_000_000
"""Bytes of an answer: more than the buffers of a connection hold."""


@dataclass
class App:
    """Reads bodies, streams for ever, and counts what happens to it."""

    reading: int = 0
    read: int = 0
    gone: int = 0
    streaming: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def application(self) -> Starlette:
        routes = [
            Route("/", self.hello, methods=["GET", "POST"]),
            Route("/echo", self.echo, methods=["POST"]),
            Route("/slow", self.slow, methods=["POST"]),
            Route("/endless", self.endless),
            Route("/large", self.large),
        ]
        return Starlette(routes=routes, exception_handlers={RequestError: self.refuse})

    async def hello(self, request: Request) -> Response:
        return PlainTextResponse("hello")

    async def echo(self, request: Request) -> Response:
        self.reading += 1
        try:
            body = await request.body()
        except ClientDisconnect:
            self.gone += 1
            raise
        self.read += 1
        return JSONResponse({"bytes": len(body)})

    async def slow(self, request: Request) -> Response:
        await request.body()
        await asyncio.sleep(1)
        return PlainTextResponse("done")

    async def endless(self, request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            self.streaming += 1
            try:
                while True:
                    yield b"x" * 65_536
                    await asyncio.sleep(0)
            finally:
                self.streaming -= 1
                self.ended.set()

        return StreamingResponse(chunks())

    async def large(self, request: Request) -> Response:
        return PlainTextResponse("x" * LARGE)

    async def refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse({"error": {"message": str(error), "code": error.code}}, error.status)


class Peer:
    """A client that says exactly what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def send(self, data: bytes | str) -> None:
        self.writer.write(data if isinstance(data, bytes) else data.encode())

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next response."""
        async with asyncio.timeout(DEADLINE_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.rstrip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            return int(first.split()[1]), headers, await self._reader.readexactly(int(headers["content-length"]))

    async def refusal(self) -> tuple[int, str, str]:
        status, _, body = await self.answer()
        error = json.loads(body)["error"]
        return status, error["code"], error["message"]

    async def read(self) -> bytes:
        return await self._reader.read(200_000)

    async def rest(self) -> bytes:
        """Everything to the end. Raises ConnectionResetError when it ends badly."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.read()

    async def closed(self) -> bytes:
        """What still comes until the server closes."""
        async with asyncio.timeout(DEADLINE_S):
            try:
                return await self._reader.read()
            except ConnectionError:
                return b""


@asynccontextmanager
async def served(app: App, **limits: Any) -> AsyncIterator[Callable[[], Awaitable[Peer]]]:
    """Gives a function that connects."""
    peers: list[Peer] = []
    async with serve_app(app.application(), limits=Limits(**limits)) as url:

        async def connect() -> Peer:
            # The limit is small, so that a reader that stops is noticed after little data.
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=2**16)
            peers.append(Peer(reader, writer))
            return peers[-1]

        yield connect
        for peer in peers:
            peer.writer.close()


def test_a_body_that_is_too_large_is_refused_with_the_limit() -> None:
    async def main() -> None:
        async with served(app := App(), body_bytes=1000) as connect:
            peer = await connect()
            peer.send("POST /echo HTTP/1.1\r\ncontent-length: 1000\r\n\r\n" + "x" * 1000)
            assert (await peer.answer())[2] == b'{"bytes":1000}'
            # Refused by what it announces: it need not be sent, and one that is being sent does no harm.
            peer.send("POST /echo HTTP/1.1\r\ncontent-length: 5000000\r\n\r\n" + "x" * 300_000)
            status, code, message = await peer.refusal()
            assert (status, code) == (413, "request_too_large") and "5000000 bytes, at most 1000" in message
            assert "--max-body-mb" in message
            # Without an announcement it is counted.
            peer = await connect()
            peer.send(
                "POST /echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + ("1f4\r\n" + "x" * 500 + "\r\n") * 3
            )
            assert (await peer.refusal())[:2] == (413, "request_too_large")
            assert app.read == 1

    asyncio.run(main())


def test_a_refused_client_that_goes_on_sending_is_let_go() -> None:
    async def main() -> None:
        async with served(App(), body_bytes=1000) as connect:
            peers = [await connect() for _ in range(3)]
            for peer, path in zip(peers, ("/echo", "/", "/nowhere"), strict=True):
                peer.send(f"POST {path} HTTP/1.1\r\ncontent-length: 100000000\r\n\r\n")
            assert [(await peer.answer())[0] for peer in peers] == [413, 200, 404]
            for peer in peers:
                assert await peer.closed() == b""

    asyncio.run(main())


@pytest.mark.parametrize("version", ["HTTP/1.1\r\nconnection: close", "HTTP/1.0", "HTTP/1.1\r\nConnection: TE, Close"])
def test_a_refused_client_that_closes_its_connection_sees_why(version: str) -> None:
    """A connection that is closed over what nobody has read is reset, and the answer is lost."""

    async def main() -> None:
        async with served(App(), body_bytes=1000) as connect:
            for path, status in (("/echo", 413), ("/", 200), ("/nowhere", 404)):
                peer = await connect()
                peer.send(f"POST {path} {version}\r\ncontent-length: 3000000\r\n\r\n" + "x" * 3_000_000)
                # To the end, where a reset would be raised.
                assert (await peer.rest()).split(b" ", 2)[1] == str(status).encode()
            peer = await connect()
            peer.send("POST /echo HTTP/1.0\r\ncontent-length: 3000000\r\n\r\n" + "x" * 2000)
            assert (await peer.answer())[0] == 413, "one that stops sending is answered too"

    asyncio.run(main())


def test_a_body_that_comes_late_is_still_read_after_the_answer() -> None:
    async def main() -> None:
        async with served(App()) as connect:
            peer = await connect()
            peer.send("POST / HTTP/1.1\r\ncontent-length: 4\r\n\r\nab")
            assert (await peer.answer())[2] == b"hello"
            peer.send("cd" + "GET / HTTP/1.1\r\n\r\n")
            assert (await peer.answer())[2] == b"hello"

    asyncio.run(main())


@pytest.mark.parametrize("split", [1, 50_000])
def test_headers_that_are_too_many_or_too_large(split: int) -> None:
    async def main() -> None:
        async with served(App(), headers=20, header_bytes=8000) as connect:
            many = "".join(f"x-{number}: 1\r\n" for number in range(21))
            for text in (many, f"x: {'y' * 9000}\r\n"):
                peer = await connect()
                request = f"GET / HTTP/1.1\r\n{text}\r\n"
                peer.send(request[:-split])
                await asyncio.sleep(0.02)
                peer.send(request[-split:])
                assert (await peer.refusal())[:2] == (431, "headers_too_large")
                assert await peer.closed() == b""

    asyncio.run(main())


def test_headers_and_addresses_that_never_end() -> None:
    async def main() -> None:
        async with served(App(), header_bytes=8000) as connect:
            for beginning in ("GET / HTTP/1.1\r\nx: ", "GET /", "GET / HTTP/1.1\r\n"):
                peer = await connect()
                peer.send(beginning)
                for _ in range(20):
                    peer.send("y: z\r\n" * 100 if beginning.endswith("\n") else "y" * 600)
                    await asyncio.sleep(0)
                assert (await peer.refusal())[0] == 431
                await peer.closed()

    asyncio.run(main())


def test_slow_headers_end_with_408_and_silence_without_a_word() -> None:
    async def main() -> None:
        async with served(App(), header_timeout_s=0.3) as connect:
            silent, slow = await connect(), await connect()
            for letter in "GET / HT":
                slow.send(letter)
                await asyncio.sleep(0.02)
            status, code, message = await slow.refusal()
            assert (status, code) == (408, "request_timeout") and "headers were not complete within 0.3 s" in message
            assert await slow.closed() == b"" and await silent.closed() == b""
            # Between requests of one connection the clock starts with the first byte.
            again = await connect()
            again.send("GET / HTTP/1.1\r\n\r\n")
            assert (await again.answer())[0] == 200
            await asyncio.sleep(0.5)
            again.send("GET / HTTP/1.1\r\n\r\nGET")
            assert (await again.answer())[0] == 200
            assert (await again.refusal())[0] == 408

    asyncio.run(main())


def test_a_slow_body_ends_with_408() -> None:
    async def main() -> None:
        async with served(app := App(), body_timeout_s=0.3) as connect:
            peer = await connect()
            peer.send("POST /echo HTTP/1.1\r\ncontent-length: 1000\r\n\r\n")
            for _ in range(8):
                peer.send("x")
                await asyncio.sleep(0.02)
            status, code, message = await peer.refusal()
            assert (status, code) == (408, "request_timeout") and "within 0.3 s (8 bytes came)" in message
            await peer.closed()
            assert app.reading == 1 and app.read == 0

    asyncio.run(main())


def test_a_request_that_is_being_answered_is_not_hurried() -> None:
    """Not by the clock of headers, nor of bodies, nor of silence; also when the next request is begun behind it."""

    async def main() -> None:
        limits = {"header_timeout_s": 0.2, "body_timeout_s": 0.2, "idle_timeout_s": 1, "stall_timeout_s": 0.2}
        async with served(App(), **limits) as connect:
            peer = await connect()
            peer.send("POST /slow HTTP/1.1\r\ncontent-length: 2\r\n\r\nab" + "GET / HT")
            assert (await peer.answer())[2] == b"done"
            peer.send("TP/1.1\r\n\r\n")
            assert (await peer.answer())[0] in (200, 408)

    asyncio.run(main())


def test_an_idle_connection_is_closed() -> None:
    async def main() -> None:
        async with served(App(), idle_timeout_s=1) as connect:
            peer, other = await connect(), await connect()
            for each in (peer, other):
                each.send("GET / HTTP/1.1\r\n\r\n")
                assert (await each.answer())[0] == 200
            # Bytes that begin nothing do not keep it open.
            other.send("\r\n")
            assert await peer.closed() == b"" and await other.closed() == b""

    asyncio.run(main())


def test_a_reader_that_stops_ends_what_it_was_reading() -> None:
    async def main() -> None:
        async with served(app := App(), stall_timeout_s=0.3, idle_timeout_s=1) as connect:
            peer = await connect()
            peer.send("GET /endless HTTP/1.1\r\n\r\n")
            async with asyncio.timeout(DEADLINE_S):
                await app.ended.wait()
            assert app.streaming == 0
            # Also an answer that is complete, but that nobody takes.
            peer = await connect()
            peer.send("GET /large HTTP/1.1\r\nconnection: close\r\n\r\n")
            await asyncio.sleep(1)
            assert len(await peer.closed()) < LARGE

    asyncio.run(main())


def test_a_reader_that_is_only_slow_gets_everything() -> None:
    async def main() -> None:
        async with served(App(), stall_timeout_s=0.2, stall_bytes=1000) as connect:
            peer, started = await connect(), asyncio.get_running_loop().time()
            peer.send("GET /large HTTP/1.1\r\n\r\n")
            received = 0
            async with asyncio.timeout(DEADLINE_S):
                while received < LARGE:
                    received += len(part := await peer.read())
                    assert part
                    await asyncio.sleep(0.005)
            assert asyncio.get_running_loop().time() - started > 2 * 0.2

    asyncio.run(main())


def test_more_connections_than_there_is_room_for() -> None:
    async def main() -> None:
        async with served(App(), connections=2) as connect:
            first, second, third = await connect(), await connect(), await connect()
            for peer in (first, second, third):
                peer.send("GET / HTTP/1.1\r\n\r\n")
            assert (await first.answer())[0] == (await second.answer())[0] == 200
            assert (await third.refusal())[:2] == (503, "too_many_connections")
            assert await third.closed() == b""
            first.writer.close()
            third.writer.close()
            await asyncio.sleep(0.1)
            again = await connect()
            again.send("GET / HTTP/1.1\r\n\r\n")
            assert (await again.answer())[0] == 200

    asyncio.run(main())


def test_trailers_do_not_grow_a_request() -> None:
    async def main() -> None:
        async with served(App()) as connect:
            peer = await connect()
            peer.send("POST /echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nx: y\r\n\r\n")
            assert (await peer.answer())[2] == b'{"bytes":2}'

    asyncio.run(main())


@pytest.mark.parametrize("head", ["connection: close\r\n", ""])
def test_a_client_that_still_sends_gets_its_refusal(head: str) -> None:
    """The answer comes before the body was read, and must not be lost when the connection is closed."""
    size = 16 * 2**20

    async def refuse(request: Request) -> PlainTextResponse:
        return PlainTextResponse("no", 401)

    async def main() -> None:
        async with serve_app(Starlette(routes=[Route("/", refuse, methods=["POST"])])) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(f"POST / HTTP/1.1\r\nhost: x\r\n{head}content-length: {size}\r\n\r\n".encode())
            for _ in range(16):
                writer.write(b"x" * 2**20)
                await writer.drain()
            answer = await asyncio.wait_for(reader.readuntil(b"no"), DEADLINE_S)
            writer.close()
            assert answer.startswith(b"HTTP/1.1 401")

    asyncio.run(main())


def test_a_client_that_sends_no_http_is_told_so_before_it_is_let_go() -> None:
    async def main() -> None:
        async with serve_app(Starlette()) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: \r\ncontent-length: 99\r\n\r\n")
            for _ in range(16):
                writer.write(b"x" * 2**20)
                await writer.drain()
            answer = await asyncio.wait_for(reader.readuntil(b"}}"), DEADLINE_S)
            writer.close()
            assert answer.startswith(b"HTTP/1.1 400") and b"Invalid HTTP request" in answer

    asyncio.run(main())
