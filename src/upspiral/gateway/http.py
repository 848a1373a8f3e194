"""Runs an ASGI application inside the current event loop."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from upspiral.errors import ConfigError, DeadlineError, UpspiralError
from upspiral.gateway.connection import Connection
from upspiral.gateway.limits import LimitedApp, Limits
from upspiral.gateway.socket_connection import SocketConnection

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 5.0
"""How long open requests may go on once the server stops."""
_BACKLOG = 2048
_OTHER_DESCRIPTORS = 128
"""File descriptors that are not for connections: the store, the model's files, pipes."""


@asynccontextmanager
async def serve_app(
    app: ASGIApp,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    unix_socket: Path | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[str]:
    """Serves `app` while the context is open and gives its URL, without a path. Port 0 takes a free one; with
    `unix_socket` the app listens there instead. Clients are held to `limits`. Leaves signals and logging alone.

    Raises ConfigError when the address cannot be bound, before anything starts.
    """
    if unix_socket is None:
        listener = _bind(host, port)
        shown_host = f"[{host}]" if ":" in host else host
        url = f"http://{shown_host}:{listener.getsockname()[1]}"
    else:
        listener, url = _bind_unix(unix_socket), f"unix:{unix_socket}"
    server = _QuietServer(_config(app, limits or Limits()))
    running = asyncio.create_task(server.serve(sockets=[listener]), name=f"server at {url}")
    try:
        await _until_started(server, running, url)
        yield url
    finally:
        server.should_exit = True
        await asyncio.wait([running], timeout=2 * STOP_DEADLINE_S)
        running.cancel()
        listener.close()
        if unix_socket is not None:
            unix_socket.unlink(missing_ok=True)


def check_address(host: str, port: int) -> None:
    """Raises ConfigError when the address cannot be bound: better to know before a model is loaded."""
    _bind(host, port).close()


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to the address. A name counts when everything that it stands for does."""
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    # The scope of a link-local address ("fe80::1%eth0") is not a part of it.
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def _config(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    available, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if available != resource.RLIM_INFINITY:
        limits = replace(limits, connections=max(1, min(limits.connections, available - _OTHER_DESCRIPTORS)))
    return uvicorn.Config(
        LimitedApp(app, limits),
        http=cast(Any, partial(Connection, limits=limits)),
        ws=cast(Any, partial(SocketConnection, limits=limits)),
        ws_max_size=limits.body_bytes,
        ws_ping_interval=limits.ping_interval_s,
        ws_ping_timeout=limits.pong_timeout_s,
        # A small message could become a large one.
        ws_per_message_deflate=False,
        lifespan="off",
        # The process that embeds the server decides about logging. URLs, which may hold keys, are never logged.
        log_config=None,
        log_level="warning",
        access_log=False,
        # Nobody stands between: what a client says about where it comes from is not believed.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=limits.idle_timeout_s,
        timeout_graceful_shutdown=int(STOP_DEADLINE_S),
    )


class _QuietServer(uvicorn.Server):
    """The process that embeds the server decides what a signal means."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _until_started(server: uvicorn.Server, running: asyncio.Task[None], url: str) -> None:
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            while not server.started:
                if running.done():
                    raise UpspiralError(f"the server at {url} stopped while starting") from running.exception()
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise DeadlineError(f"waited {START_DEADLINE_S:g} s for the server at {url} to start") from None


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; else an answer of two packets takes 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use by another process; stop it, choose another port, "
                "or give port 0 to take a free one"
            ) from error
        raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose another host or port") from error
    return listener


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            # Left behind by a process that was killed: a run folder belongs to one run at a time.
            path.unlink()
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on the unix socket {path}: {error}; its path must be writable and shorter than 108 bytes"
        ) from error
    return listener
