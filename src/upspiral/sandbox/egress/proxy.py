"""An HTTP proxy on a unix socket that lets a sandbox reach the hosts of its allow-list, and writes down what it did.

It resolves names itself and connects to the address that it has checked, so a name cannot lead to this machine or its
networks, however it changes between two look-ups. Encrypted connections pass through it as they are (CONNECT): it sees
their host and not their content, and does not look whether what passes is TLS, or TLS for that host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType

from upspiral.errors import SandboxError
from upspiral.sandbox.base import Allow
from upspiral.sandbox.egress.attempts import Connect, reach_first
from upspiral.sandbox.egress.head import Request, parse_request
from upspiral.sandbox.egress.policy import Policy, parse_address
from upspiral.sandbox.egress.record import EgressLimits, EgressRecord
from upspiral.sandbox.egress.relay import CHUNK_BYTES, CutOff, Ends, HeadTooLong, Traffic, exchange, read_head, tunnel
from upspiral.sandbox.open_files import enough_for_a_sandbox

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a name and a port to its addresses; OSError when there are none."""

_LONGEST_SOCKET_PATH = 107
_FAREWELL_S = 1.0
_LONGEST_REASON = 300
"""It may quote what the client sent, and is kept in the log."""
_USUAL_LIMITS = EgressLimits()
_lookups = ThreadPoolExecutor(16, "egress-lookup")
"""Their own threads: names that are slow to resolve, and a sandbox may ask for many, hold up nothing else."""


def proxy_environment(port: int) -> Mapping[str, str]:
    """What programs inside have to have in their environment to use the proxy at this port of their loopback."""
    address = f"http://127.0.0.1:{port}"
    names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    local = "localhost,127.0.0.1,::1"
    # Node reads the others only when it is told to.
    return {**dict.fromkeys(names, address), "no_proxy": local, "NO_PROXY": local, "NODE_USE_ENV_PROXY": "1"}


async def resolve_name(name: str, port: int) -> Sequence[str]:
    """By this machine's resolver."""
    look_up = partial(socket.getaddrinfo, name, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_lookups, look_up)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class EgressProxy:
    """The proxy of one sandbox. Each connection out is told to `log` once, when it has ended or was refused."""

    def __init__(
        self,
        allow: Allow,
        log: Callable[[EgressRecord], None],
        *,
        labels: Mapping[str, str] | None = None,
        limits: EgressLimits = _USUAL_LIMITS,
        resolve: Resolve = resolve_name,
        connect: Connect | None = None,
    ) -> None:
        """Raises ConfigError for an entry of `allow` that is not understood. `labels` go into each record. `resolve`
        and `connect` are there for networks with ways of their own."""
        self.limits = limits
        self.labels = labels or {}
        self._policy = Policy(allow)
        self._log = log
        self._resolve = resolve
        self._connect = connect or self._connect_directly
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._total_bytes = 0
        self._num_records = 0

    async def start(self, path: Path) -> None:
        """Listens at a unix socket that only this user may open. Raises SandboxError when it cannot; SandboxBusyError
        for want of open files."""
        if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
            raise SandboxError(f"{path}: too long for a unix socket ({_LONGEST_SOCKET_PATH} bytes)")
        try:
            with enough_for_a_sandbox():
                self._server = await asyncio.start_unix_server(self._accept, path, limit=self.limits.header_bytes)
            path.chmod(0o600)
        except OSError as error:
            raise SandboxError(f"the egress proxy could not listen at {path}: {error}") from error
        self._path = path

    async def stop(self) -> None:
        """Ends every connection; their records say so. Safe to call twice."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def __aenter__(self) -> EgressProxy:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        if len(self._tasks) > 2 * self.limits.connections:
            writer.transport.abort()  # who asks this often is not owed an answer
            return
        task = asyncio.create_task(_Connection(self, reader, writer).run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def is_full(self) -> bool:
        """Counting the connection that asks."""
        return len(self._tasks) > self.limits.connections

    def count(self, size: int) -> None:
        """Raises CutOff when the proxy has moved all that it may."""
        self._total_bytes += size
        if self._total_bytes > self.limits.total_bytes:
            raise CutOff(f"all connections together moved more than {self.limits.total_bytes} bytes")

    def write_down(self, record: EgressRecord) -> None:
        """Not for ever: what is inside could fill the host's memory with it."""
        self._num_records += 1
        if self._num_records < self.limits.records:
            self._log(record)
        elif self._num_records == self.limits.records:
            self._log(replace(record, reason=f"{record.reason}; later connections are not written down".lstrip("; ")))

    async def open(self, request: Request) -> tuple[str, StreamReader, StreamWriter]:
        """A connection to the first permitted address that answers, and that address. Raises Refused."""
        if not self._policy.names(request.host, request.port):
            raise Refused(403, f"{request.host}:{request.port} is not on the allow-list of this sandbox")
        try:
            async with asyncio.timeout(self.limits.connect_timeout_s):
                return await self._reach(request)
        except TimeoutError:
            reason = f"{request.host}:{request.port} was not reached in {self.limits.connect_timeout_s:g} s"
            raise Refused(504, reason, allowed=True) from None

    async def _reach(self, request: Request) -> tuple[str, StreamReader, StreamWriter]:
        addresses = await self._permitted_addresses(request.host, request.port)
        try:
            return await reach_first(self._connect, addresses, request.port)
        except OSError as error:
            reason = f"{request.host}:{request.port} could not be reached: {error}"
            raise Refused(502, reason, allowed=True) from None

    async def _permitted_addresses(self, host: str, port: int) -> Sequence[str]:
        try:
            found = [parse_address(each) for each in await self._resolve(host, port)]
        except (OSError, ValueError) as error:
            raise Refused(502, f"{host} could not be resolved: {error}", allowed=True) from None
        permitted = [str(each) for each in found if self._policy.permits(each, host)]
        if not permitted:
            listed = ", ".join(map(str, found)) or "nothing"
            raise Refused(403, f"{host} leads to {listed}, which is no public address")
        return permitted

    async def _connect_directly(self, address: str, port: int) -> tuple[StreamReader, StreamWriter]:
        return await asyncio.open_connection(address, port, limit=self.limits.header_bytes)


class Refused(Exception):
    """The client gets this status and reason. `allowed`: the list had the destination, but it did not work."""

    def __init__(self, status: int, reason: str, *, allowed: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason[:_LONGEST_REASON]
        self.allowed = allowed


_PHRASES = {400: "Bad Request", 403: "Forbidden", 408: "Request Timeout", 431: "Request Header Fields Too Large",
            502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}  # fmt: skip


class _Connection:
    """One client's connection, from its request to its record."""

    def __init__(self, proxy: EgressProxy, reader: StreamReader, writer: StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._upstream: StreamWriter | None = None
        self._request: Request | None = None
        self._address = ""
        self._allowed = False
        self._idle: asyncio.Timeout | None = None
        self._traffic = Traffic(self._moved)

    async def run(self) -> None:
        time_s, started_s = time.time(), time.monotonic()
        reason = "the proxy was stopped"
        try:
            reason = await self._serve()
        finally:
            self._abort()
            if self._request or reason:  # a connection that asked for nothing is none
                host, port = (self._request.host, self._request.port) if self._request else ("", 0)
                sent, received = self._traffic.sent_bytes, self._traffic.received_bytes
                self._proxy.write_down(
                    EgressRecord(
                        time_s, host, port, self._address, self._allowed, reason, sent, received,
                        time.monotonic() - started_s, self._proxy.labels,
                    )
                )  # fmt: skip

    async def _serve(self) -> str:
        """Returns what went wrong, or nothing."""
        try:
            ends = await self._open()
            self._allowed = True
            return await self._relay(ends)
        except Refused as refusal:
            self._allowed = refusal.allowed
            await self._say_refused(refusal)
            return refusal.reason
        except OSError as error:
            return f"the client is gone: {error}"

    async def _open(self) -> Ends:
        if self._proxy.is_full:
            raise Refused(503, f"this sandbox has {self._proxy.limits.connections} connections open already")
        self._request = await self._read_request()
        self._address, reader, self._upstream = await self._proxy.open(self._request)
        return Ends((self._reader, self._writer), (reader, self._upstream))

    async def _read_request(self) -> Request:
        limits = self._proxy.limits
        try:
            async with asyncio.timeout(limits.header_timeout_s):
                return parse_request(await read_head(self._reader))
        except TimeoutError:
            raise Refused(408, f"no request came in {limits.header_timeout_s:g} s") from None
        except HeadTooLong as error:
            raise Refused(431, str(error)) from None
        except (CutOff, ValueError) as error:
            raise Refused(400, str(error)) from None

    async def _relay(self, ends: Ends) -> str:
        assert self._request is not None
        try:
            async with asyncio.timeout(self._proxy.limits.idle_timeout_s) as self._idle:
                if self._request.is_tunnel:
                    self._writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    await tunnel(ends, self._traffic)
                else:
                    await exchange(self._request, ends, self._traffic)
            return ""
        except (CutOff, ValueError, OSError) as error:
            reason = str(error) or "the destination closed the connection"
            if self._idle is not None and self._idle.expired():
                reason = f"nothing moved for {self._proxy.limits.idle_timeout_s:g} s"
        if not self._request.is_tunnel and self._traffic.received_bytes == 0:
            raise Refused(502, reason, allowed=True)
        return reason[:_LONGEST_REASON]

    def _moved(self, count: int) -> None:
        limits = self._proxy.limits
        if self._traffic.sent_bytes + self._traffic.received_bytes > limits.connection_bytes:
            raise CutOff(f"the connection moved more than {limits.connection_bytes} bytes")
        self._proxy.count(count)
        if self._idle is not None and not self._idle.expired():
            self._idle.reschedule(asyncio.get_running_loop().time() + limits.idle_timeout_s)

    async def _say_refused(self, refusal: Refused) -> None:
        """An answer for whoever reads what went wrong inside. What the client still sends is read for a moment: closing
        before that would make the answer unreadable."""
        body = f"egress: {refusal.reason}\n".encode()
        head = f"HTTP/1.1 {refusal.status} {_PHRASES[refusal.status]}\r\nContent-Type: text/plain; charset=utf-8\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        with contextlib.suppress(OSError):
            async with asyncio.timeout(_FAREWELL_S):
                self._writer.write(head.encode() + body)
                self._writer.write_eof()
                while await self._reader.read(CHUNK_BYTES):
                    pass

    def _abort(self) -> None:
        """What had to be sent was sent by now, or nobody takes it."""
        for writer in (self._writer, self._upstream):
            # A transport that has closed by itself cannot be aborted any more.
            if writer is not None and not (writer.is_closing() and writer.transport.get_write_buffer_size() == 0):
                writer.transport.abort()
