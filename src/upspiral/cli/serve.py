"""`upspiral serve`: the gateway alone, for people whose agents run elsewhere."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from upspiral.engine.base import Engine
from upspiral.errors import ConfigError

EngineKind = Literal["embedded", "scripted"]
_CONTEXT_LENGTH, _MAX_RUNNING, _CACHE_SLOTS = 4096, 8, 16
"""Agents from elsewhere bring long prompts; for a small model this cache still fits a laptop (1.5 GB at 135M)."""


def serve(
    *,
    model: str = "smollm2-135m",
    engine: EngineKind = "embedded",
    script: Path | None = None,
    run: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
) -> None:
    """Start the gateway alone. Prints one JSON line {"url", "admin_key"} when it is ready; Ctrl-C ends it.

    Parameters
    ----------
    model
        A name from `upspiral model list`, a local Hugging Face folder, or a hub id.
    engine
        "embedded" samples from the model; "scripted" plays `--script`.
    script
        A file with one JSON line per answer: {"text": ...} or {"token_ids": [...]}. Needed by the scripted engine.
    run
        The folder that the trajectory store is written to.
    host
        The address to listen on. Whoever reaches it can use the model with a rollout's key.
    port
        The port to listen on; 0 takes a free one.
    """
    if (engine == "scripted") != (script is not None):
        raise ConfigError(
            "--engine scripted needs --script FILE" if script is None else "--script FILE needs --engine scripted"
        )
    asyncio.run(_serve(model, script, run, host, port))


async def _serve(model: str, script: Path | None, run: Path, host: str, port: int) -> None:
    # Imported here so that `upspiral --help` stays instant.
    from upspiral.gateway.http import check_address, serve_app
    from upspiral.gateway.server import Gateway
    from upspiral.rendering.renderer import Renderer
    from upspiral.trajectory.store import TrajectoryStore
    from upspiral.weights.models import resolve_model

    check_address(host, port)
    folder = resolve_model(model, weights=script is None)
    renderer = Renderer.from_folder(folder)
    renderer.check_append_only()
    stop = asyncio.Event()
    admin_key = f"ak-up-{secrets.token_urlsafe(24)}"
    async with _running(_scripted(script, renderer) if script else _embedded(folder)) as engine:
        store = TrajectoryStore(run / "trajectories.db")
        try:
            gateway = Gateway(renderer, engine, store, model_name=model, admin_key=admin_key)
            async with serve_app(gateway.app, host=host, port=port) as url:
                _stop_on_signals(stop)
                print(json.dumps({"url": url, "admin_key": admin_key}), flush=True)
                # Ends when a person or a process manager says so: the one wait without a deadline.
                await stop.wait()
        finally:
            store.close()


@asynccontextmanager
async def _running(engine: Engine) -> AsyncIterator[Engine]:
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def _scripted(script: Path, renderer: Any) -> Engine:
    from upspiral.engine.scripted import ScriptedEngine

    return ScriptedEngine.from_file(script, encode=renderer.encode_answer)


def _embedded(folder: Path) -> Engine:
    try:
        from upspiral.engine.embedded.engine import EmbeddedEngine
        from upspiral.weights.load import load_model
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--engine embedded needs {error.name}; install it with `pip install 'upspiral[train]'` or use "
            "--engine scripted"
        ) from error
    from upspiral.config.models import EngineConfig, ModelConfig

    loaded = load_model(folder, dtype=ModelConfig().dtype, device=ModelConfig().device)
    context_length = min(_CONTEXT_LENGTH, loaded.config.max_position_embeddings)
    config = EngineConfig(context_length=context_length, max_running=_MAX_RUNNING, cache_slots=_CACHE_SLOTS)
    return EmbeddedEngine(loaded, config, seed=secrets.randbelow(2**31))


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Outside the main thread (tests) or on Windows there is no such handler; there a KeyboardInterrupt ends us.
        with suppress(NotImplementedError, ValueError, RuntimeError):
            loop.add_signal_handler(number, stop.set)
