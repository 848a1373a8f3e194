"""The flags of `upspiral serve` that say which engine answers, and that engine."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from upspiral.engine.base import Engine
from upspiral.errors import ConfigError

if TYPE_CHECKING:
    from upspiral.rendering.renderer import Renderer

EngineKind = Literal["embedded", "scripted", "vllm", "sglang"]
_CONTEXT_LENGTH, _MAX_RUNNING, _CACHE_SLOTS = 4096, 8, 16
"""Agents from elsewhere bring long prompts; for a small model this cache still fits a laptop (1.5 GB at 135M)."""
_MAX_RUNNING_SERVED = 64
_NVIDIA = Path("/dev/nvidiactl")
"""Is there when there is a GPU; torch, which could be asked, is not in every install."""


@dataclass(frozen=True, slots=True)
class EngineSource:
    """Which engine answers."""

    engine: Annotated[
        EngineKind,
        Parameter(
            help='"embedded" samples from the model in this process; "vllm" starts a vLLM server for it, or uses those '
            'of --engine-url, as "sglang" does; "scripted" plays --script.'
        ),
    ] = "embedded"
    script: Annotated[
        Path | None,
        Parameter(
            help='A file with one JSON line per answer: {"text": ...} or {"token_ids": [...]}. Needed by the scripted '
            "engine."
        ),
    ] = None
    engine_url: Annotated[
        tuple[str, ...],
        Parameter(
            help="The address of a vLLM or SGLang server that runs already and has the model, or of "
            "several. The key that it wants is in the environment variable UPSPIRAL_ENGINE_KEY.",
            show_default=False,
        ),
    ] = ()

    def check(self) -> None:
        """Raises ConfigError when the flags do not fit each other."""
        if self.engine == "scripted" and self.script is None:
            raise ConfigError("--engine scripted needs --script FILE")
        if self.engine != "scripted" and self.script is not None:
            raise ConfigError("--script FILE needs --engine scripted")
        if self.engine_url and self.engine not in ("vllm", "sglang"):
            raise ConfigError(f"--engine-url {self.engine_url[0]} needs --engine vllm or --engine sglang")
        if self.engine == "sglang" and not self.engine_url:
            raise ConfigError("--engine sglang needs --engine-url URL: start its server yourself (docs/cluster.md)")

    @property
    def needs_weights(self) -> bool:
        """Whether the model's folder must have its weights."""
        return self.engine == "embedded" or (self.engine == "vllm" and not self.engine_url)

    def make(self, model_folder: Path, renderer: Renderer, run: Path) -> Engine:
        """The engine, not started. Raises ConfigError when something that it needs is not installed."""
        if self.script is not None:
            return _scripted(self.script, renderer)
        if self.engine_url:
            return _remote(self.engine, self.engine_url)
        return _vllm(model_folder, run) if self.engine == "vllm" else _embedded(model_folder)


def _scripted(script: Path, renderer: Renderer) -> Engine:
    from upspiral.engine.scripted import ScriptedEngine

    return ScriptedEngine.from_file(script, encode=renderer.encode_answer)


def _remote(kind: EngineKind, urls: tuple[str, ...]) -> Engine:
    """Their weights are somebody else's to change: all tokens are of version 0."""
    from upspiral.engine.router import Router
    from upspiral.engine.sglang.client import SglangEngine
    from upspiral.engine.vllm.client import VllmEngine
    from upspiral.loop.servers import KEY_VARIABLE

    key, client = os.environ.get(KEY_VARIABLE, ""), VllmEngine if kind == "vllm" else SglangEngine
    return Router([client(url, key=key, version=None) for url in urls])


def _vllm(model_folder: Path, run: Path) -> Engine:
    from upspiral.config.models import ModelConfig
    from upspiral.engine.kept import KeptEngine
    from upspiral.engine.router import Router, patience_beyond
    from upspiral.engine.vllm.environment import vllm_python
    from upspiral.engine.vllm.server import ServerSettings, VllmServer

    longest = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    settings = ServerSettings(
        vllm_python(), model_folder, run / "logs" / "vllm.log", ModelConfig().dtype, min(_CONTEXT_LENGTH, longest),
        _MAX_RUNNING_SERVED, cpu=not _NVIDIA.exists(), threads=len(os.sched_getaffinity(0)),
    )  # fmt: skip
    settings.check()
    patience_s = patience_beyond(settings.start_timeout_s)
    return Router([KeptEngine(lambda: VllmServer(settings))], patience_s=patience_s)


def _embedded(folder: Path) -> Engine:
    try:
        from upspiral.engine.embedded.engine import EmbeddedEngine
        from upspiral.weights.load import load_model
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--engine embedded needs {error.name}; install it with `pip install 'upspiral[train]'` or use another "
            "--engine"
        ) from error
    from upspiral.config.models import EngineConfig, ModelConfig

    loaded = load_model(folder, dtype=ModelConfig().dtype, device=ModelConfig().device)
    context_length = min(_CONTEXT_LENGTH, loaded.config.max_position_embeddings)
    config = EngineConfig(context_length=context_length, max_running=_MAX_RUNNING, cache_slots=_CACHE_SLOTS)
    return EmbeddedEngine(loaded, config, seed=secrets.randbelow(2**31))
