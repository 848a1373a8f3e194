"""Builds the parts of a run from its config, in the order in which bad input is cheapest to find, and stops them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.applications import Starlette
from starlette.routing import Mount

from upspiral.agent.base import AgentRunner
from upspiral.agent.command import CommandAgent
from upspiral.agent.launched import LaunchedAgent
from upspiral.agent.pool import WorkerPool
from upspiral.config.models import RunConfig
from upspiral.engine.base import Engine
from upspiral.env.base import Environment
from upspiral.env.registry import make_environment
from upspiral.env.tool_server import ToolServer
from upspiral.errors import ConfigError, SandboxError
from upspiral.gateway.collector import seldom_collected
from upspiral.gateway.http import serve_app
from upspiral.gateway.server import Gateway
from upspiral.loop.folder import RunFolder
from upspiral.loop.learner import Learner
from upspiral.loop.placement import Placement, Setting, make_policy
from upspiral.loop.rollouts import Addresses, Limits, RolloutRunner, Stage
from upspiral.monitor.progress import Progress
from upspiral.rendering.renderer import Renderer
from upspiral.sandbox.base import Allow, SandboxBackend, SandboxSpec
from upspiral.sandbox.egress.log_file import EgressFile
from upspiral.sandbox.registry import open_backend
from upspiral.trajectory.store import TrajectoryStore
from upspiral.weights.models import resolve_model


@dataclass(frozen=True, slots=True)
class Parts:
    """The standing parts of a run."""

    renderer: Renderer
    engine: Engine
    learner: Learner
    environment: Environment
    store: TrajectoryStore
    gateway: Gateway
    runner: RolloutRunner


@asynccontextmanager
async def assemble(
    config: RunConfig, folder: RunFolder, progress: Progress, placement: Placement | None = None
) -> AsyncIterator[Parts]:
    """All parts, started. They are stopped, newest first, when the context ends. `placement`: see `make_policy`."""
    async with AsyncExitStack() as stack:
        progress.phase("loading the model")
        model_folder = resolve_model(config.model.path)
        renderer = Renderer.from_folder(model_folder)
        renderer.check_append_only()
        agents = _agents(config)
        environment = make_environment(config.env)
        placed = await placement.sandboxes(config, folder.egress_log) if placement is not None else None
        sandboxes = placed or await open_backend(config.sandbox, EgressFile(folder.egress_log))
        stack.push_async_callback(sandboxes.stop)
        spec = agents.furnish(_spec(config), str(folder.gateway_socket))
        await _try_out(sandboxes, spec, config)
        await agents.start()
        stack.push_async_callback(agents.stop)
        store = TrajectoryStore(folder.store)
        stack.callback(store.close)
        setting = Setting(config, model_folder, folder.path, stack, tell=progress.note)
        engine, learner = await make_policy(setting, placement)
        gateway = Gateway(renderer, engine, store, model_name=config.model.path)
        stage = Stage(gateway, ToolServer(environment.tools), sandboxes, spec, agents, environment, store)
        addresses = await _serve(config, folder, stage, stack)
        limits = Limits(config.agent.concurrency, config.agent.timeout_s, config.env.command_timeout_s)
        runner = RolloutRunner(stage, addresses, limits)
        yield Parts(renderer, engine, learner, environment, store, gateway, runner)


def _spec(config: RunConfig) -> SandboxSpec:
    hosts = config.sandbox.allow_hosts
    return SandboxSpec(image=config.sandbox.image, network=Allow(hosts) if hosts else "none")


async def _try_out(sandboxes: SandboxBackend, spec: SandboxSpec, config: RunConfig) -> None:
    """Raises ConfigError when no sandbox can be had, before anything is computed. The gateway is not there yet."""
    try:
        sandboxes.capabilities.check(spec, backend=config.sandbox.backend)
        async with sandboxes.acquire(replace(spec, forward_sockets={})):
            pass
    except SandboxError as error:
        raise ConfigError(f"[sandbox] cannot be had as it is in the run file: {error}") from error


def _agents(config: RunConfig) -> AgentRunner:
    if config.agent.command is not None:
        return CommandAgent(config.agent.command)
    if config.agent.kind is not None:
        return LaunchedAgent(config.agent.kind)
    assert config.agent.file is not None, "the config has exactly one of agent.file, agent.command and agent.kind"
    return WorkerPool(Path(config.agent.file), workers=config.agent.workers)


async def _serve(config: RunConfig, folder: RunFolder, stage: Stage, stack: AsyncExitStack) -> Addresses:
    """Gateway and tools on one loopback port, and on a unix socket for agents that run inside the sandbox."""
    stack.enter_context(seldom_collected())
    app = Starlette(routes=[Mount("/agent", app=stage.tools.app), Mount("/", app=stage.gateway.app)])
    url = await stack.enter_async_context(serve_app(app, host="127.0.0.1", port=0))
    if config.agent.file is None:
        await stack.enter_async_context(serve_app(app, unix_socket=folder.gateway_socket))
    return Addresses(f"{url}/v1", f"{url}/agent/tools", config.model.path, config.engine.context_length)
