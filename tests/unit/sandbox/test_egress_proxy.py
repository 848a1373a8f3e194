"""The egress proxy against real clients and destinations on unix sockets: what passes, what not, and what is logged."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import resource
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import psutil
import pytest

from upspiral.errors import ConfigError, SandboxBusyError, SandboxError
from upspiral.sandbox.base import Allow, SandboxSpec
from upspiral.sandbox.egress import EgressLimits, EgressLog, EgressProxy, EgressRecord, way_out
from upspiral.sandbox.egress.log_file import EgressFile

DEADLINE_S = 20.0
PUBLIC = "93.184.216.34"
OTHER = "198.41.0.4"
SILENT = "2620:0:862:ed1a::1"
Serve = Callable[[StreamReader, StreamWriter], Awaitable[None]]


async def echo(reader: StreamReader, writer: StreamWriter) -> None:
    """Sends back what comes, and its farewell after the client's."""
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()
    writer.write(b"bye")
    await writer.drain()


@dataclass
class World:
    """A proxy and destinations by address, all on unix sockets."""

    folder: Path
    names: dict[str, Sequence[str]] = field(default_factory=lambda: {"example.org": [PUBLIC]})
    serve: Serve = echo
    log: EgressLog = field(default_factory=EgressLog)
    looked_up: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)
    opened: list[tuple[StreamReader, StreamWriter]] = field(default_factory=list)
    silence: asyncio.Event = field(default_factory=asyncio.Event)
    """Of an address that answers when this is over."""

    async def resolve(self, name: str, port: int) -> Sequence[str]:
        self.looked_up.append(name)
        if name not in self.names:
            raise OSError("no such name")
        return self.names[name]

    async def connect(self, address: str, port: int) -> tuple[StreamReader, StreamWriter]:
        self.connected.append(f"{address}:{port}")
        if address == OTHER:
            raise ConnectionRefusedError("refused")
        if address == SILENT:
            await self.silence.wait()
        self.opened.append(await asyncio.open_unix_connection(self.folder / "up", limit=32 * 1024))
        return self.opened[-1]

    @property
    def record(self) -> EgressRecord:
        assert len(self.log.records) == 1, self.log.records
        return self.log.records[0]

    async def client(self) -> tuple[StreamReader, StreamWriter]:
        return await asyncio.open_unix_connection(self.folder / "proxy")

    async def talk(self, request: bytes) -> bytes:
        """Sends and reads to the end, without ending its own side."""
        reader, writer = await self.client()
        writer.write(request)
        answer = await reader.read()
        writer.close()
        await self.settled()
        return answer

    async def settled(self, count: int = 1) -> None:
        """Waits until so many connections were written down."""
        while len(self.log.records) < count:
            await asyncio.sleep(0.005)

    async def tunnel(self, host: str = "example.org:443") -> tuple[StreamReader, StreamWriter]:
        reader, writer = await self.client()
        writer.write(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        return reader, writer


@contextlib.asynccontextmanager
async def running(world: World, allow: Allow, limits: EgressLimits) -> AsyncIterator[EgressProxy]:
    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await world.serve(reader, writer)
        writer.close()

    proxy = EgressProxy(allow, world.log, limits=limits, resolve=world.resolve, connect=world.connect)
    async with await asyncio.start_unix_server(serve, world.folder / "up"), proxy:
        await proxy.start(world.folder / "proxy")
        yield proxy


def play(
    world: World,
    act: Callable[[], Awaitable[None]],
    *hosts: str,
    networks: tuple[str, ...] = (),
    limits: EgressLimits = EgressLimits(),  # noqa: B008
) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), running(world, Allow(hosts or ("example.org",), networks), limits):
            await act()

    asyncio.run(run())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def respond(*pieces: bytes, seen: list[bytes] | None = None) -> Serve:
    """A destination that reads a head and a short body, and answers with these pieces."""

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if seen is not None:
            seen.append(head)
        for piece in pieces:
            writer.write(piece)
        await writer.drain()

    return serve


GET = b"GET http://example.org/a?b HTTP/1.1\r\nHost: example.org\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@pytest.mark.parametrize(
    ("rules", "asked", "allowed"),
    [
        (["example.org"], "example.org:443", True),
        (["example.org"], "EXAMPLE.org.:443", True),
        (["Example.ORG"], "example.org:443", True),
        (["example.org"], "example.org:80", True),
        (["example.org"], "example.org:8080", False),
        (["example.org:8080"], "example.org:8080", True),
        (["example.org:8080"], "example.org:443", False),
        (["example.org"], "a.example.org:443", False),
        ([".example.org"], "example.org:443", True),
        ([".example.org"], "a.b.example.org:443", True),
        ([".example.org"], "badexample.org:443", False),
        ([".example.org:99"], "a.example.org:99", True),
        ([".example.org"], "example.org.evil.net:443", False),
        (["evil.net", "example.org"], "example.org:443", True),
        (["bücher.example"], "xn--bcher-kva.example:443", True),
        ([PUBLIC], f"{PUBLIC}:443", True),
        (["example.org"], f"{PUBLIC}:443", False),
        (["10.0.0.7:5432"], "10.0.0.7:5432", True),
        (["[fd00::7]:80"], "[FD00:0::7]:80", True),
    ],
)
def test_the_list_decides_by_host_and_port(world: World, rules: list[str], asked: str, allowed: bool) -> None:
    async def resolve(name: str, port: int) -> Sequence[str]:
        return [name] if name[0].isdigit() or ":" in name else [PUBLIC]

    world.resolve = resolve

    async def act() -> None:
        answer = await world.talk(f"CONNECT {asked} HTTP/1.1\r\n\r\n".encode()) if not allowed else b""
        if allowed:
            _, writer = await world.tunnel(asked)
            writer.close()
            await world.settled()
        assert world.record.allowed == allowed
        assert b"not on the allow-list" in answer or allowed
        assert bool(world.connected) == allowed

    play(world, act, *rules)


def test_a_refused_name_is_not_even_looked_up(world: World) -> None:
    async def act() -> None:
        answer = await world.talk(b"CONNECT secret-data.evil.net:443 HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403 ") and b"secret-data.evil.net:443 is not on" in answer
        assert (world.looked_up, world.connected) == ([], [])
        assert (world.record.host, world.record.port, world.record.allowed) == ("secret-data.evil.net", 443, False)

    play(world, act)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fd00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1", "192.0.0.192", "168.63.129.16",
        "::ffff:168.63.129.16", "64:ff9b:1::7f00:1", "169.254.170.2", "fd00:ec2::254",
    ],
)  # fmt: skip
def test_a_name_cannot_lead_into_this_machine_or_its_networks(world: World, address: str) -> None:
    world.names["example.org"] = [address]

    async def act() -> None:
        answer = await world.talk(b"CONNECT example.org:443 HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403 ") and b"no public address" in answer
        assert world.connected == []
        assert not world.record.allowed

    play(world, act)


@pytest.mark.parametrize("address", [PUBLIC, f"::ffff:{PUBLIC}", "2606:4700::1111"])
def test_a_public_address_of_this_machine_is_no_way_out(
    world: World, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [psutil.net_if_addrs()["lo"][0]._replace(family=family, address=each)
           for family, each in [(socket.AF_INET, PUBLIC), (socket.AF_INET6, "2606:4700::1111")]]  # fmt: skip
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": own})
    world.names["example.org"] = [address]

    async def act() -> None:
        assert b"no public address" in await world.talk(b"CONNECT example.org:443 HTTP/1.1\r\n\r\n")
        assert world.connected == []

    play(world, act)


def test_a_zone_does_not_make_an_address_a_name_of_the_list(world: World) -> None:
    async def act() -> None:
        answer = await world.talk(b"CONNECT [2606:4700::1111%.example.org]:443 HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ") and b"has a zone" in answer
        assert world.looked_up == world.connected == []

    play(world, act, ".example.org")


def test_a_network_can_be_allowed(world: World) -> None:
    world.names = {"example.org": ["10.1.2.3"], "other.org": ["10.2.0.1"]}

    async def act() -> None:
        _, writer = await world.tunnel()
        writer.close()
        await world.settled()
        assert (world.record.address, world.connected) == ("10.1.2.3", ["10.1.2.3:443"])
        assert b"403" in await world.talk(b"CONNECT other.org:443 HTTP/1.1\r\n\r\n")

    play(world, act, "example.org", "other.org", networks=("10.1.0.0/16",))


def test_a_name_that_changes_its_address_is_resolved_once(world: World) -> None:
    """The address that was checked is the one that is connected to."""

    async def resolve(name: str, port: int) -> Sequence[str]:
        world.looked_up.append(name)
        return [PUBLIC] if len(world.looked_up) == 1 else ["127.0.0.1"]

    world.resolve = resolve

    async def act() -> None:
        _, writer = await world.tunnel()
        writer.close()
        await world.settled()
        assert world.looked_up == ["example.org"]
        assert world.connected == [f"{PUBLIC}:443"]
        assert b"403" in await world.talk(b"CONNECT example.org:443 HTTP/1.1\r\n\r\n")
        assert world.connected == [f"{PUBLIC}:443"]

    play(world, act)


def test_only_permitted_addresses_of_a_name_are_tried_in_turn(world: World) -> None:
    world.names["example.org"] = ["127.0.0.1", OTHER, PUBLIC]

    async def act() -> None:
        _, writer = await world.tunnel()
        writer.close()
        await world.settled()
        assert world.connected == [f"{OTHER}:443", f"{PUBLIC}:443"]

    play(world, act)


def test_an_address_that_keeps_silent_holds_nothing_up(world: World) -> None:
    world.names["example.org"] = [SILENT, OTHER, PUBLIC]

    async def act() -> None:
        reader, writer = await world.tunnel()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert world.connected == [f"{SILENT}:443", f"{OTHER}:443", f"{PUBLIC}:443"]
        writer.close()
        await world.settled()
        assert world.record.address == PUBLIC and world.record.duration_s < DEADLINE_S / 4

    play(world, act)


def test_of_two_addresses_that_answer_at_once_one_is_left(world: World) -> None:
    world.names["example.org"], ended = [SILENT, SILENT], asyncio.Event()

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            await echo(reader, writer)
        finally:
            ended.set()

    async def act() -> None:
        opening = asyncio.create_task(world.tunnel())
        while len(world.connected) < 2:
            await asyncio.sleep(0.01)
        world.silence.set()
        reader, writer = await opening
        await ended.wait()
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()

    world.serve = serve
    play(world, act)


def test_only_silence_takes_the_time_for_a_connection(world: World) -> None:
    world.names["example.org"] = [SILENT, SILENT]

    async def act() -> None:
        assert b"504" in await world.talk(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")

    play(world, act, limits=EgressLimits(connect_timeout_s=0.6))


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        (b"CONNECT gone.org:443", 502, b"no such name"),
        (b"CONNECT closed.org:443", 502, b"refused"),
        (b"GET http://gone.org/", 502, b"no such name"),
    ],
)
def test_what_cannot_be_reached_is_said(world: World, asked: bytes, status: int, said: bytes) -> None:
    world.names["closed.org"] = [OTHER]

    async def act() -> None:
        answer = await world.talk(asked + b" HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status) and said in answer
        assert world.record.allowed and said.decode() in world.record.reason

    play(world, act, "gone.org", "closed.org")


@pytest.mark.parametrize(
    ("request_bytes", "said"),
    [
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", b"begins with http://"),
        (b"GET https://example.org/ HTTP/1.1\r\n\r\n", b"begins with http://"),
        (b"GET http://example.org/ HTTP/1.1\r\nHost: example.org\r\nHost: evil.net\r\n\r\n", b"more than one Host"),
        (b"GET http://example.org/ HTTP/1.1\r\nHost: example.org\r\nhOST: example.org\r\n\r\n", b"more than one Host"),
        (b"GET http://example.org/ HTTP/1.1\r\nHost: evil.net\r\n\r\n", b"the Host header names"),
        (b"GET http://example.org/ HTTP/1.1\r\nHost: example.org:81\r\n\r\n", b"the Host header names"),
        (b"CONNECT example.org:443 HTTP/1.1\r\nHost: evil.net:443\r\n\r\n", b"the Host header names"),
        (b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:80\r\n\r\n", b"the Host header names"),
        (b"CONNECT example.org:443 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", b"CONNECT with a body"),
        (b"CONNECT example.org HTTP/1.1\r\n\r\n", b"needs a host and a port"),
        (b"CONNECT example.org:0 HTTP/1.1\r\n\r\n", b"is no port"),
        (b"CONNECT example.org:99999 HTTP/1.1\r\n\r\n", b"is no port"),
        (b"CONNECT 2130706433:443 HTTP/1.1\r\n\r\n", b""),
        (b"CONNECT 0x7f000001:443 HTTP/1.1\r\n\r\n", b""),
        (b"CONNECT 127.1:443 HTTP/1.1\r\n\r\n", b""),
        (b"CONNECT example.org\x00:443 HTTP/1.1\r\n\r\n", b"the target"),
        (b"GET http://evil.net@example.org/ HTTP/1.1\r\n\r\n", b"not understood"),
        (b"GET http://example.org\\@evil.net/ HTTP/1.1\r\n\r\n", b"not understood"),
        (b"GET http://example.org/ HTTP/1.1\r\nHost : example.org\r\n\r\n", b"no header"),
        (b"GET http://example.org/ HTTP/1.1\r\nA: b\r\n c\r\n\r\n", b"no header"),
        (b"GET http://example.org/ HTTP/1.1\r\nA: b\nHost: evil.net\r\n\r\n", b"no header"),
        (b"GET http://example.org/ HTTP/1.1\r\nA: b\rHost: evil.net\r\n\r\n", b"no header"),
        (b"GET  http://example.org/ HTTP/1.1\r\n\r\n", b"request line"),
        (b"GET http://example.org/ HTTP/2.0\r\n\r\n", b"request line"),
        (b"GET http://example.org/ HTTP/1.1 \r\n\r\n", b"request line"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"request line"),
        (b"POST http://example.org/ HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", b"one number"),
        (b"POST http://example.org/ HTTP/1.1\r\nContent-Length: +1\r\n\r\na", b"one number"),
        (b"POST http://example.org/ HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\na", b"both"),
        (b"POST http://example.org/ HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\na", b"other than chunked"),
        (b"POST http://example.org/ HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\na", b"other than chunked"),
    ],
)
def test_what_can_be_understood_in_two_ways_is_refused(world: World, request_bytes: bytes, said: bytes) -> None:
    async def act() -> None:
        answer = await world.talk(request_bytes)
        assert answer.startswith(b"HTTP/1.1 400 ") and said in answer, answer
        assert world.connected == []
        assert not world.record.allowed and said.decode() in world.record.reason

    play(world, act)


def test_a_plain_request_is_rewritten_for_its_destination(world: World) -> None:
    seen: list[bytes] = []
    world.serve = respond(OK, seen=seen)
    request = (
        b"GET http://example.org:8080/a/../b?c#d HTTP/1.1\r\nHost: example.org:8080\r\nProxy-Authorization: x\r\n"
        b"Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nAccept: */*\r\n\r\n"
        b"GET http://evil.net/ HTTP/1.1\r\n\r\n"
    )

    async def act() -> None:
        answer = await world.talk(request)
        assert seen == [b"GET /a/../b?c HTTP/1.1\r\nHost: example.org:8080\r\nAccept: */*\r\nConnection: close\r\n\r\n"]
        assert answer == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
        assert (world.record.sent_bytes, world.record.received_bytes) == (len(seen[0]), len(answer))

    play(world, act, "example.org:8080")


@pytest.mark.parametrize(
    ("answer", "forwarded"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\nto the end", b"to the end"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n0\r\nT: x\r\n\r\n",
            b"2\r\nab\r\n0\r\n\r\n",
        ),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"\r\n\r\n"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi and more than it said", b"\r\n\r\nhi"),
    ],
)
def test_answers_of_every_length(world: World, answer: bytes, forwarded: bytes) -> None:
    world.serve = respond(answer)

    async def act() -> None:
        got = await world.talk(GET)
        assert got.endswith(forwarded), got
        assert world.record.reason == ""

    play(world, act)


def test_an_answer_without_body_ends_although_the_destination_keeps_the_connection(world: World) -> None:
    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: keep-alive\r\n\r\n")
        await reader.read()

    world.serve = serve

    async def act() -> None:
        got = await world.talk(GET.replace(b"GET", b"HEAD"))
        assert got == b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n"

    play(world, act)


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 101 Switching\r\n\r\n", b"HTTP/1.1 200 OK\r\nbroken\r\n\r\n", b"HTTP/1.1"],
)
def test_an_answer_that_is_none_is_a_bad_gateway(world: World, answer: bytes) -> None:
    world.serve = respond(answer)

    async def act() -> None:
        assert (await world.talk(GET)).startswith(b"HTTP/1.1 502 ")
        assert world.record.allowed and world.record.reason

    play(world, act)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_goes_through_whole(world: World, chunked: bool) -> None:
    content = os.urandom(3 << 20)
    digest = hashlib.sha256(content).hexdigest().encode()

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert (b"chunked" in head.lower()) == chunked
        body = await _read_chunks(reader) if chunked else await reader.readexactly(len(content))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + hashlib.sha256(body).hexdigest().encode())
        await writer.drain()

    world.serve = serve
    framed = b"".join(b"%X\r\n%s\r\n" % (len(part), part) for part in _parts(content)) + b"0\r\n\r\n"
    header, body = (
        (b"Transfer-Encoding: Chunked", framed) if chunked else (b"Content-Length: %d" % len(content), content)
    )

    async def act() -> None:
        answer = await world.talk(b"POST http://example.org/ HTTP/1.1\r\n" + header + b"\r\n\r\n" + body)
        assert answer.endswith(digest)
        assert world.record.sent_bytes > len(content)

    play(world, act)


def _parts(content: bytes) -> Sequence[bytes]:
    return [content[start : start + 300_000] for start in range(0, len(content), 300_000)]


async def _read_chunks(reader: StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readuntil(b"\r\n"))[:-2], 16):
        body += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    return body


@pytest.mark.parametrize("body", [b"zz\r\n", b"-1\r\n", b"1\r\nab\r\n", b"ffffffffffffffffff\r\n", b"1 1\r\n", b"\r\n"])
def test_a_broken_chunk_ends_the_request(world: World, body: bytes) -> None:
    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        await reader.read()

    world.serve = serve

    async def act() -> None:
        head = b"POST http://example.org/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert (await world.talk(head + body)).startswith(b"HTTP/1.1 502 ")
        assert "chunk" in world.record.reason

    play(world, act)


@pytest.mark.parametrize("tunnelled", [False, True])
def test_a_client_that_reads_late_gets_everything(world: World, tunnelled: bool) -> None:
    """The proxy is done with it while much of the answer still waits to be taken."""
    content = b""

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        if not tunnelled:
            await reader.readuntil(b"\r\n\r\n")
        writer.write(content if tunnelled else b"HTTP/1.1 200 OK\r\n\r\n" + content)
        await writer.drain()

    world.serve = serve

    async def act() -> None:
        nonlocal content
        for turn in range(16):  # in some of them the end waits in the proxy itself
            content = os.urandom(300_000 + turn * 20_000)
            reader, writer = await asyncio.open_unix_connection(world.folder / "proxy", limit=1024)
            writer.write(b"CONNECT example.org:443 HTTP/1.1\r\n\r\n" if tunnelled else GET)
            if tunnelled:
                writer.write_eof()
            await asyncio.sleep(0.05)
            assert (await reader.read()).endswith(content)
            writer.close()
            await world.settled(turn + 1)
        assert {each.reason for each in world.log.records} == {""}

    play(world, act)


def test_an_early_answer_is_not_held_back_by_the_request(world: World) -> None:
    world.serve = respond(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")

    async def act() -> None:
        answer = await world.talk(b"POST http://example.org/ HTTP/1.1\r\nContent-Length: 1000000\r\n\r\nfirst bytes")
        assert answer.startswith(b"HTTP/1.1 413 ")

    play(world, act)


def test_a_tunnel_passes_the_end_of_one_way_and_goes_on_with_the_other(world: World) -> None:
    async def act() -> None:
        reader, writer = await world.tunnel()
        writer.write(b"\x00binary\xff")
        assert await reader.readexactly(8) == b"\x00binary\xff"
        writer.write_eof()
        assert await reader.read() == b"bye"
        writer.close()
        await world.settled()
        assert (world.record.reason, world.record.sent_bytes, world.record.received_bytes) == ("", 8, 11)
        assert world.record.duration_s > 0 and world.record.address == PUBLIC

    play(world, act)


def test_a_tunnel_whose_destination_ends_first(world: World) -> None:
    received = asyncio.Event()

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        writer.write(b"all I have")
        writer.write_eof()
        assert await reader.read() == b"still listening"
        received.set()

    world.serve = serve

    async def act() -> None:
        reader, writer = await world.tunnel()
        assert await reader.read() == b"all I have"
        writer.write(b"still listening")
        writer.write_eof()
        await received.wait()
        writer.close()

    play(world, act)


def test_a_big_transfer_through_a_tunnel_both_ways(world: World) -> None:
    content = os.urandom(1 << 20)
    rounds = 32

    async def act() -> None:
        reader, writer = await world.tunnel()

        async def send() -> None:
            for _ in range(rounds):
                writer.write(content)
                await writer.drain()
            writer.write_eof()

        sending = asyncio.create_task(send())
        for _ in range(rounds):
            assert await reader.readexactly(len(content)) == content
        assert await reader.read() == b"bye"
        await sending
        writer.close()
        await world.settled()
        assert world.record.sent_bytes == rounds * len(content)

    play(world, act)


def test_a_client_that_dribbles_its_head_is_cut_off(world: World) -> None:
    async def act() -> None:
        reader, writer = await world.client()
        answer = asyncio.create_task(reader.read())
        with contextlib.suppress(ConnectionError):
            for byte in b"CONNECT example.org:443 HTTP/1.1\r\n":
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
        assert (await answer).startswith(b"HTTP/1.1 408 ")
        writer.close()
        await world.settled()
        assert "no request came in 0.2 s" in world.record.reason

    play(world, act, limits=EgressLimits(header_timeout_s=0.2))


def test_a_head_without_end_is_refused(world: World) -> None:
    async def act() -> None:
        answer = await world.talk(b"GET http://example.org/ HTTP/1.1\r\nA: " + b"b" * 5000)
        assert answer.startswith(b"HTTP/1.1 431 ")

    play(world, act, limits=EgressLimits(header_bytes=2048))


def test_a_silent_connection_is_ended(world: World) -> None:
    async def act() -> None:
        reader, writer = await world.tunnel()
        for _ in range(4):  # longer than the limit in all, but never silent that long
            writer.write(b"x")
            assert await reader.read(10) == b"x"
            await asyncio.sleep(0.15)
        assert await reader.read() == b""
        writer.close()
        await world.settled()
        assert world.record.reason == "nothing moved for 0.4 s"
        assert world.record.duration_s >= 0.8

    play(world, act, limits=EgressLimits(idle_timeout_s=0.4))


def test_a_client_that_does_not_read_is_ended(world: World) -> None:
    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    world.serve = serve

    async def act() -> None:
        _, writer = await world.tunnel()
        await world.settled()
        assert world.record.reason == "nothing moved for 0.3 s"
        writer.close()

    play(world, act, limits=EgressLimits(idle_timeout_s=0.3))


def test_more_connections_than_allowed_are_refused_until_one_ends(world: World) -> None:
    async def act() -> None:
        first, second = await world.tunnel(), await world.tunnel()
        answer = await world.talk(b"CONNECT example.org:443 HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ") and b"2 connections open" in answer
        first[1].close()
        await world.settled(2)
        third = await world.tunnel()
        for _, writer in (second, third):
            writer.close()
        await world.settled(4)

    play(world, act, limits=EgressLimits(connections=2))


def test_a_flood_of_connections_is_dropped(world: World) -> None:
    async def act() -> None:
        clients = [await world.client() for _ in range(50)]
        ended = asyncio.gather(*(reader.read() for reader, _ in clients), return_exceptions=True)
        await asyncio.sleep(0.1)
        for _, writer in clients:
            writer.close()
        answers = await ended
        assert sum(isinstance(each, bytes) and each.startswith(b"HTTP/1.1 503") for each in answers) <= 4
        assert sum(not each or isinstance(each, OSError) for each in answers) >= 44

    play(world, act, limits=EgressLimits(connections=2))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (EgressLimits(connection_bytes=100_000), "the connection moved more than 100000 bytes"),
        (EgressLimits(total_bytes=100_000), "all connections together moved more than 100000 bytes"),
    ],
)
def test_more_bytes_than_allowed_end_a_connection(world: World, limits: EgressLimits, said: str) -> None:
    async def act() -> None:
        reader, writer = await world.tunnel()
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"x" * 10_000)
                await writer.drain()
                await asyncio.sleep(0)
        with contextlib.suppress(ConnectionError):
            assert len(await reader.read()) <= 100_000
        writer.close()
        await world.settled()
        assert world.record.reason == said

    play(world, act, limits=limits)


def test_stopping_ends_connections_and_takes_the_socket_away(world: World) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), running(world, Allow(("example.org",)), EgressLimits()) as proxy:
            reader, writer = await world.tunnel()
            waiting, silent_writer = await world.client()
            await asyncio.sleep(0.05)
            await proxy.stop()
            assert await reader.read() == b"" and await waiting.read() == b""
            assert sorted((each.host, each.reason) for each in world.log.records) == [
                ("", "the proxy was stopped"),
                ("example.org", "the proxy was stopped"),
            ]
            assert not (world.folder / "proxy").exists()
            with pytest.raises(OSError):
                await world.client()
            await proxy.stop()
            writer.close()
            silent_writer.close()

    asyncio.run(run())


def test_a_proxy_for_which_no_open_file_is_left_is_refused_as_busy(world: World) -> None:
    async def act() -> None:
        proxy, limits = EgressProxy(Allow(("example.org",)), world.log), resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with pytest.raises(SandboxBusyError, match="RLIMIT_NOFILE"):
                await proxy.start(world.folder / "another")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    asyncio.run(act())


def test_a_connection_that_asks_nothing_is_no_record(world: World) -> None:
    async def act() -> None:
        _, writer = await world.client()
        writer.close()
        await writer.wait_closed()
        await world.talk(b"CONNECT evil.net:443 HTTP/1.1\r\n\r\n")
        assert world.record.host == "evil.net"

    play(world, act)


@pytest.mark.parametrize(
    "rule", ["", "*", "exa mple.org", "example.org:", "example.org:http", "http://example.org", "1.2.3"]
)
def test_a_rule_that_is_none_is_an_error(rule: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed host .* give a name such as pypi\.org"):
        EgressProxy(Allow((rule,)), EgressLog())


def test_a_network_that_is_none_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"allowed network: .*10\.0\.0\.0/33"):
        EgressProxy(Allow((), networks=("10.0.0.0/33",)), EgressLog())


def test_a_path_that_cannot_be_listened_at_is_an_error(tmp_path: Path) -> None:
    async def run() -> None:
        for path in (tmp_path / ("x" * 100), tmp_path / "no-such-folder" / "p"):
            with pytest.raises(SandboxError, match=str(path)):
                await EgressProxy(Allow(()), EgressLog()).start(path)

    asyncio.run(run())


def test_a_spec_gets_a_way_out(tmp_path: Path) -> None:
    async def run() -> None:
        log = EgressLog()
        spec = SandboxSpec(
            network=Allow(("example.org",)), env={"A": "b", "no_proxy": "mine"}, labels={"rollout": "7"},
            forward_sockets={3128: "/somewhere"},
        )  # fmt: skip
        async with way_out(spec, tmp_path, log) as made:
            assert (made.network, made.forward_sockets[3128], len(made.forward_sockets)) == ("none", "/somewhere", 2)
            assert made.env["https_proxy"] == made.env["HTTP_PROXY"] == "http://127.0.0.1:3129"
            assert (made.env["A"], made.env["no_proxy"]) == ("b", "mine")
            reader, writer = await asyncio.open_unix_connection(made.forward_sockets[3129])
            writer.write(b"CONNECT evil.net:443 HTTP/1.1\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 403 ")
            writer.close()
        assert [(each.host, each.labels) for each in log.records] == [("evil.net", {"rollout": "7"})]
        assert list(tmp_path.iterdir()) == []
        async with way_out(SandboxSpec(), tmp_path, log) as made:
            assert made == SandboxSpec()
        with pytest.raises(ConfigError):
            async with way_out(SandboxSpec(network=Allow(("*",))), tmp_path, log):
                pass

    asyncio.run(run())


def test_what_a_client_sends_cannot_swell_the_log(world: World) -> None:
    async def act() -> None:
        await world.talk(b"CONNECT " + b"x" * 20_000 + b":443 HTTP/1.1\r\n\r\n")
        assert len(world.record.reason) <= 300 and world.record.host == ""

    play(world, act)


def test_one_sandbox_writes_so_many_records(world: World) -> None:
    async def act() -> None:
        for number in range(5):
            assert b"403" in await world.talk(f"CONNECT evil{number}.net:443 HTTP/1.1\r\n\r\n".encode())
            await world.settled(min(number + 1, 3))
        assert [each.host for each in world.log.records] == ["evil0.net", "evil1.net", "evil2.net"]
        assert world.log.records[2].reason.endswith("of this sandbox; later connections are not written down")

    play(world, act, limits=EgressLimits(records=3))


def test_the_log_is_bounded() -> None:
    log = EgressLog(capacity=2)
    for number in range(5):
        log(EgressRecord(0.0, str(number), 1, "", False, "", 0, 0, 0.0))
    assert ([each.host for each in log.records], log.dropped) == (["0", "1"], 3)


def test_a_line_that_a_kill_has_cut_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "egress.jsonl"
    record = EgressRecord(0.0, "one", 1, "", False, "", 0, 0, 0.0)
    EgressFile(path)(record)
    path.write_bytes(path.read_bytes() + b'{"time_s":0')
    EgressFile(path)(record)
    EgressFile(path)(record)
    first, half, *others = path.read_bytes().splitlines()
    assert half == b'{"time_s":0' and [orjson.loads(each)["host"] for each in (first, *others)] == ["one"] * 3
