"""The engines of a run that are inference servers: started here, or running elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from upspiral.config.models import RunConfig, ServerConfig
from upspiral.engine.base import UNPUBLISHED_VERSION, UpdatableEngine
from upspiral.engine.kept import KeptEngine
from upspiral.engine.routed_layers import RoutedLayers
from upspiral.engine.router import Router, patience_beyond
from upspiral.engine.sglang.client import SglangEngine
from upspiral.engine.vllm.client import VllmEngine
from upspiral.engine.vllm.environment import vllm_python
from upspiral.engine.vllm.server import ServerSettings, VllmServer
from upspiral.errors import ConfigError

KEY_VARIABLE = "UPSPIRAL_ENGINE_KEY"
"""The environment variable with the key that servers elsewhere want, if they want one."""


def servers(
    config: RunConfig, model_folder: Path, logs: Path, *, cpu: bool, threads: int, waits: bool = True
) -> UpdatableEngine:
    """The router over them, not started. `waits`: for those that die to be started again."""
    server = config.engine.server or ServerConfig()
    key = os.environ.get(KEY_VARIABLE, "")
    routes = RoutedLayers.of_folder(model_folder) if config.engine.routes == "replay" else None
    patience_s = patience_beyond(server.start_timeout_s) if waits else 0.0
    if server.urls:
        return Router([_client(config, url, key, routes) for url in server.urls], patience_s=patience_s)
    if config.engine.kind != "vllm":
        raise ConfigError(
            f'engine.kind = "{config.engine.kind}" cannot be started here; start its servers yourself, with the model '
            f"{config.model.path}, and name them in engine.server.urls"
        )
    if routes is not None and cpu:
        raise ConfigError(
            'engine.routes = "replay": vLLM cannot load the weights of experts anew on a CPU; use engine.kind = '
            '"embedded" here, or name servers with GPUs in engine.server.urls'
        )
    settings = [
        ServerSettings(
            Path(server.python) if server.python else vllm_python(),
            model_folder,
            logs / f"vllm-{number}.log",
            config.model.dtype,
            config.engine.context_length,
            config.engine.max_running,
            cpu=cpu,
            cache_gb=server.cache_gb,
            threads=max(1, threads // server.replicas),
            arguments=server.arguments,
            start_timeout_s=server.start_timeout_s,
            version=UNPUBLISHED_VERSION,
            sleeps=config.engine.colocated,
            routes=routes,
        )
        for number in range(server.replicas)
    ]
    for each in settings:
        each.check()
    return Router([KeptEngine(lambda each=each: VllmServer(each)) for each in settings], patience_s=patience_s)


def _client(config: RunConfig, url: str, key: str, routes: RoutedLayers | None) -> UpdatableEngine:
    tolerance = 0.005 if config.model.dtype == "float32" else 0.25
    client = VllmEngine if config.engine.kind == "vllm" else SglangEngine
    return client(url, key=key, probe_tolerance=tolerance, version=UNPUBLISHED_VERSION, routes=routes)
