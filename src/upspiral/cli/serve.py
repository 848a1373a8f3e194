"""`upspiral serve`: the gateway alone, for people whose agents run elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from upspiral.cli.engine_source import EngineSource
from upspiral.engine.base import Engine
from upspiral.errors import ConfigError

if TYPE_CHECKING:
    from upspiral.trajectory.store import TrajectoryStore

ADMIN_KEY_VARIABLE = "UPSPIRAL_ADMIN_KEY"
INTERRUPTED = "interrupted: the gateway stopped before the rollout was finished"
"""Why a rollout is cancelled that nobody finished."""
_SHORTEST_ADMIN_KEY = 16
_EMBEDDED, _MODEL = EngineSource(), "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Exposure:
    """Who can reach the gateway, and how much it takes from them."""

    host: Annotated[
        str,
        Parameter(
            help="The address to listen on. One that other machines can reach needs an admin key of your own in the "
            f"environment variable {ADMIN_KEY_VARIABLE}."
        ),
    ] = "127.0.0.1"
    max_body_mb: Annotated[int, Parameter(help="The largest request that is read.")] = 64
    max_connections: Annotated[int, Parameter(help="Connections at the same time; others are told to come back.")] = (
        4096
    )


def serve(
    *,
    model: str | None = None,
    run: Path,
    port: int = 8000,
    source: Annotated[EngineSource, Parameter(name="*")] = _EMBEDDED,
    exposure: Annotated[Exposure, Parameter(name="*")] = Exposure(),
) -> None:
    """Start the gateway alone. Prints one JSON line {"url", "admin_key"} when it is ready; Ctrl-C ends it.

    The admin key is a new one each time, or the one in the environment variable UPSPIRAL_ADMIN_KEY, which is not
    printed. Rollouts that an earlier gateway in the same folder left unfinished are marked as cancelled.

    Parameters
    ----------
    model
        A name from `upspiral model list`, a local Hugging Face folder, or a hub id; smollm2-135m, unless servers of
        --engine-url have another one, which must be named.
    run
        The folder that the trajectory store is written to.
    port
        The port to listen on; 0 takes a free one.
    """
    source.check()
    if source.engine_url and model is None:
        raise ConfigError(
            f"--engine-url {source.engine_url[0]} needs --model: the name or folder of the model that the server has, "
            "whose tokenizer renders what it is asked"
        )
    asyncio.run(_serve(model or _MODEL, source, run, port, exposure))


async def _serve(model: str, source: EngineSource, run: Path, port: int, exposure: Exposure) -> None:
    # Imported here so that `upspiral --help` stays instant.
    from upspiral.gateway.collector import seldom_collected
    from upspiral.gateway.http import check_address, serve_app
    from upspiral.gateway.limits import Limits
    from upspiral.gateway.server import Gateway
    from upspiral.rendering.renderer import Renderer
    from upspiral.weights.models import resolve_model

    check_address(exposure.host, port)
    own_key = _own_admin_key(exposure.host)
    admin_key = own_key or f"ak-up-{secrets.token_urlsafe(24)}"
    limits = Limits(
        body_bytes=_at_least_one("--max-body-mb", exposure.max_body_mb) * 2**20,
        connections=_at_least_one("--max-connections", exposure.max_connections),
    )
    folder = resolve_model(model, weights=source.needs_weights)
    renderer = Renderer.from_folder(folder)
    renderer.check_append_only()
    stop = asyncio.Event()
    with _store(run) as store, seldom_collected():
        async with _running(source.make(folder, renderer, run)) as engine:
            gateway = Gateway(renderer, engine, store, model_name=model, admin_key=admin_key)
            async with serve_app(gateway.app, host=exposure.host, port=port, limits=limits) as url:
                _stop_on_signals(stop)
                # Whoever chose the key knows it, and what a service prints ends up in its log.
                print(json.dumps({"url": url, "admin_key": None if own_key else admin_key}), flush=True)
                # Ends when a person or a process manager says so: the one wait without a deadline.
                await stop.wait()


def _at_least_one(flag: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{flag} {value} lets nobody in; give a number from 1 on")
    return value


def _own_admin_key(host: str) -> str:
    """The admin key that somebody chose; "" when nobody did and nobody had to."""
    from upspiral.gateway.http import is_loopback

    key = os.environ.get(ADMIN_KEY_VARIABLE, "")
    example = f"export {ADMIN_KEY_VARIABLE}=$(openssl rand -hex 24)"
    if not key:
        if is_loopback(host):
            return ""
        raise ConfigError(
            f"--host {host} can be reached from other machines, and {ADMIN_KEY_VARIABLE} is not set. Set a key that "
            f"you keep (`{example}`), or listen on 127.0.0.1"
        )
    if len(key) < _SHORTEST_ADMIN_KEY or not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(
            f"{ADMIN_KEY_VARIABLE} must have at least {_SHORTEST_ADMIN_KEY} printable ASCII characters and no space; "
            f"it has {len(key)} characters. Make a new one: `{example}`"
        )
    return key


@contextmanager
def _store(run: Path) -> Iterator[TrajectoryStore]:
    """The store of a folder that no other process writes to. No rollout outlives the gateway that can answer it."""
    from upspiral.loop.folder import lock_folder
    from upspiral.trajectory.store import TrajectoryStore

    run.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(run)
    try:
        store = TrajectoryStore(run / "trajectories.db")
        try:
            _cancel_unfinished(store, "an earlier gateway left")
            yield store
            _cancel_unfinished(store, "stopped with")
        finally:
            store.close()
    finally:
        os.close(lock)


def _cancel_unfinished(store: TrajectoryStore, left: str) -> None:
    if count := store.cancel_running(INTERRUPTED):
        rollouts = "rollout" if count == 1 else "rollouts"
        print(f"{left} {count} unfinished {rollouts} in {store.path}; marked as cancelled", file=sys.stderr)


@asynccontextmanager
async def _running(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Outside the main thread (tests) or on Windows there is no such handler; there a KeyboardInterrupt ends us.
        with suppress(NotImplementedError, ValueError, RuntimeError):
            loop.add_signal_handler(number, stop.set)
