"""Runs an ASGI application inside the current event loop."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from upspiral.errors import ConfigError, DeadlineError, UpspiralError

START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 5.0
"""How long open requests may go on once the server stops."""
_BACKLOG = 2048


@asynccontextmanager
async def serve_app(
    app: ASGIApp, *, host: str = "127.0.0.1", port: int = 0, unix_socket: Path | None = None
) -> AsyncIterator[str]:
    """Serves `app` while the context is open and gives its URL, without a path. Port 0 takes a free one; with
    `unix_socket` the app listens there instead. Leaves signals alone.

    Raises ConfigError when the address cannot be bound, before anything starts.
    """
    if unix_socket is None:
        listener = _bind(host, port)
        shown_host = f"[{host}]" if ":" in host else host
        url = f"http://{shown_host}:{listener.getsockname()[1]}"
    else:
        listener, url = _bind_unix(unix_socket), f"unix:{unix_socket}"
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=int(STOP_DEADLINE_S)
    )
    server = _QuietServer(config)
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
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
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
