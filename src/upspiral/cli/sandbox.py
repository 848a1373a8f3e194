"""`upspiral sandbox`: serve sandboxes to other processes and machines, list them, and remove what dead ones left."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from upspiral.errors import ConfigError
from upspiral.sandbox.registry import TOKEN_VARIABLE

if TYPE_CHECKING:
    from upspiral.sandbox.egress import EgressRecord
    from upspiral.sandbox.server.tenants import Tenants

_DEFAULT_TENANT = "default"


@dataclass(frozen=True, slots=True)
class Size:
    """How much the server takes of its machine."""

    live: Annotated[int, Parameter(help="Sandboxes at the same time.")] = 1000
    starting: Annotated[int, Parameter(help="Sandboxes that are being made at the same time.")] = 32
    queued: Annotated[int, Parameter(help="Requests that may wait; others are told to come back (429).")] = 1000
    warm: Annotated[int, Parameter(help="Of each kind that is asked for, so many wait ready at most.")] = 32


@dataclass(frozen=True, slots=True)
class Exposure:
    """Who can reach the server."""

    host: Annotated[
        str,
        Parameter(help="The address to listen on. One that other machines can reach needs tokens that somebody chose."),
    ] = "127.0.0.1"
    port: Annotated[int, Parameter(help="The port to listen on; 0 takes a free one.")] = 8100
    tenants: Annotated[
        Path | None,
        Parameter(help="A TOML file with a table a tenant: token, and limits such as live, memory_mb, lifetime_s."),
    ] = None


def serve(
    *,
    backend: str = "namespace",
    drain_s: float = 600.0,
    heartbeat_s: float | None = None,
    size: Annotated[Size, Parameter(name="*")] = Size(),
    exposure: Annotated[Exposure, Parameter(name="*")] = Exposure(),
) -> None:
    """Lease sandboxes to other processes. Prints one JSON line {"url", "token"} when it is ready.

    Without --tenants there is one tenant, whose token is a new one each time, or the one in the environment variable
    UPSPIRAL_SANDBOX_TOKEN, which is not printed. SIGTERM or Ctrl-C: no more sandboxes are given out, and those that
    are out may be used for --drain-s seconds; a second signal ends them at once. What sandboxes connect to is written
    to stderr, a JSON line {"egress": ...} each.

    Parameters
    ----------
    backend
        What makes the sandboxes: namespace, docker, podman, or process, which is for code that one trusts. `upspiral
        doctor` says which of them this machine has.
    drain_s
        How long to wait for sandboxes in use before they are stopped.
    heartbeat_s
        A sandbox whose client gives no sign for so long is stopped; when not given, somewhat longer than clients try
        to take a lost line up again.
    """
    asyncio.run(_serve(backend, drain_s, heartbeat_s, size, exposure))


def list_sandboxes(url: str = "http://127.0.0.1:8100") -> None:
    """List the sandboxes that the tenant of UPSPIRAL_SANDBOX_TOKEN has on a server.

    Parameters
    ----------
    url
        The server's address.
    """
    asyncio.run(_list(url))


def collect_garbage() -> None:
    """Remove what sandboxes of processes that died have left on this machine, and print it."""
    from upspiral.sandbox.registry import sweep

    removed = sweep()
    for path in removed:
        print(path)
    if not removed:
        print("nothing was left", file=sys.stderr)


async def _serve(backend: str, drain_s: float, heartbeat_s: float | None, size: Size, exposure: Exposure) -> None:
    # Imported here so that `upspiral --help` stays instant.
    from upspiral.gateway.http import check_address, serve_app
    from upspiral.sandbox.open_files import allow_many
    from upspiral.sandbox.pool import Pool, PoolLimits
    from upspiral.sandbox.registry import make_backend
    from upspiral.sandbox.server.app import SandboxServer
    from upspiral.sandbox.server.wire import HEARTBEAT_S

    heartbeat_s = HEARTBEAT_S if heartbeat_s is None else heartbeat_s
    if not heartbeat_s > 0:
        raise ConfigError(f"--heartbeat-s {heartbeat_s:g} would end every sandbox at once; give seconds, such as 90")
    check_address(exposure.host, exposure.port)
    tenants, new_token = _tenants(exposure)
    limits = PoolLimits(live=size.live, starting=size.starting, queued=size.queued, warm_max=size.warm)
    server = SandboxServer(Pool(make_backend(backend, _write_down), limits), tenants, heartbeat_s=heartbeat_s)
    allow_many()
    stop, hurry = _stop_on_signals()
    try:
        async with serve_app(server.app, host=exposure.host, port=exposure.port) as url:
            print(json.dumps({"url": url, "token": new_token}), flush=True)
            # Ends when a person or a process manager says so: the one wait without a deadline.
            await stop.wait()
            draining = [asyncio.ensure_future(each) for each in (server.drain(timeout_s=drain_s), hurry.wait())]
            await asyncio.wait(draining, return_when=asyncio.FIRST_COMPLETED)
            for each in draining:
                each.cancel()
    finally:
        await server.drain(timeout_s=0.0)


def _write_down(record: EgressRecord) -> None:
    with suppress(OSError):  # nobody reads it
        print(json.dumps({"egress": asdict(record)}), file=sys.stderr, flush=True)


async def _list(url: str) -> None:
    from upspiral.sandbox.remote import RemoteBackend

    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise ConfigError(f"whose sandboxes? Put a tenant's token into the environment variable {TOKEN_VARIABLE}")
    backend = RemoteBackend(url, token)
    try:
        listed = await backend.list_sandboxes()
        for each in listed:
            labels = " ".join(f"{name}={value}" for name, value in each.labels.items())
            print(f"{each.id}  {each.age_s:.0f} s old  ends in {each.ends_in_s:.0f} s  {each.memory_mb} MB  {labels}")
        if not listed:
            print(f"this tenant has no sandboxes at {url}", file=sys.stderr)
    finally:
        await backend.stop()


def _tenants(exposure: Exposure) -> tuple[Tenants, str | None]:
    """And the token to be told, if it is a new one."""
    from upspiral.gateway.http import is_loopback
    from upspiral.sandbox.server.tenants import Quota, Tenant, Tenants, check_token

    if exposure.tenants is not None:
        return Tenants.from_file(exposure.tenants), None
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and not is_loopback(exposure.host):
        raise ConfigError(
            f"--host {exposure.host} can be reached from other machines. Say who may come: --tenants FILE, or a token "
            f"that you keep in {TOKEN_VARIABLE} (`openssl rand -hex 24`); or listen on 127.0.0.1"
        )
    is_new = not token
    token = token or f"sb-up-{secrets.token_urlsafe(24)}"
    check_token(token, TOKEN_VARIABLE)
    # Whoever chose the token knows it, and what a service prints ends up in its log.
    return Tenants([(token, Tenant(_DEFAULT_TENANT, Quota()))]), token if is_new else None


def _stop_on_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Set at the first signal, and at the second."""
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()

    def told() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        # Outside the main thread (tests) or on Windows there is no such handler; there a KeyboardInterrupt ends us.
        with suppress(NotImplementedError, ValueError, RuntimeError):
            loop.add_signal_handler(number, told)
    return first, second
