"""The actor that has one engine of a run and serves it over a socket: tokens do not pass through Ray."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path

from upspiral.config.models import RunConfig
from upspiral.engine.served.server import EngineServer
from upspiral.launch.ray.devices import hidden_without
from upspiral.loop.placement import Setting, ThisMachine, prepare_process


class EngineHost:
    """An asyncio actor. It dies with the actor that made it."""

    def __init__(self, config: RunConfig, model_folder: Path, folder: Path, key: str) -> None:
        self._config, self._model_folder, self._folder, self._key = config, model_folder, folder, key
        self._stack = AsyncExitStack()

    async def start(self) -> tuple[str, int, str]:
        """Address and port where the engine is served, with the weights of the model's folder, and the node's id."""
        import ray

        os.environ |= hidden_without(self._config.cluster.engine_gpus)
        prepare_process(self._config)
        setting = Setting(self._config, self._model_folder, self._folder, self._stack)
        engine = await ThisMachine(waits=False).engine(setting)  # the run's own router does
        server = EngineServer(engine, self._key)
        host = ray.util.get_node_ip_address()
        port = await server.start(host)
        self._stack.push_async_callback(server.stop)
        return host, port, ray.get_runtime_context().get_node_id()

    async def live(self) -> None:
        """Never returns: who waits for it hears of the actor's death."""
        await asyncio.Event().wait()
