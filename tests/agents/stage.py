"""Everything that a launched agent meets, for real but for the engine: launcher, sandbox, gateway on a unix socket,
store, verifier, credit. The task is made of file operations, so that the sandbox shows whether they were done."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.fixtures.recording_engine import EngineCall, RecordingEngine
from tests.fixtures.tiny_model import make_tokenizer
from upspiral.agent.launched import LaunchedAgent
from upspiral.agent.packages import cached_agent
from upspiral.algorithm.base import ScoredRollout
from upspiral.algorithm.grpo import grpo_credit
from upspiral.config.models import AlgorithmConfig
from upspiral.engine.base import Engine
from upspiral.engine.scripted import ScriptedEngine, ScriptLine
from upspiral.env.base import DemonstrationTurn, Task
from upspiral.env.tool_server import ToolServer
from upspiral.gateway.http import serve_app
from upspiral.gateway.request import SessionPolicy
from upspiral.gateway.server import Gateway
from upspiral.loop.rollouts import Addresses, Attempt, Limits, RolloutRunner, Stage
from upspiral.rendering.renderer import Renderer
from upspiral.sandbox.base import Sandbox, SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.ledger import check_closed
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Ledger, Rollout, RolloutStatus, ToolSpec

CONTEXT_LENGTH = 400_000
"""The tiny tokenizer makes a token of every two or three characters, and system prompts have up to 100 kB."""
SOCKET = "gateway.sock"
TIMEOUT_S = 60.0
SECRET = "the harbour opens at 6:42"
"""Stands in a file that only the agent's tools can read."""
ANSWER = "All four steps are done."
TASK = Task(
    id="files",
    split="train",
    kind="files",
    difficulty=4,
    instruction=(
        "Create notes/plan.txt that says 'buy bread', then change bread into cheese, list the folder and read "
        "harbour.txt. Say when it is done."
    ),
    files={"harbour.txt": f"{SECRET}\n".encode()},
)


class Files:
    """Judges by what lies in the sandbox afterwards. Satisfies Environment."""

    tools: Sequence[ToolSpec] = ()

    def task(self, split: str, index: int) -> Task:
        del split, index
        return TASK

    def demonstrate(self, task: Task) -> Sequence[DemonstrationTurn]:
        del task
        return []

    async def verify(self, task: Task, answer: str, sandbox: Sandbox) -> float:
        del task
        try:
            plan = await sandbox.read("notes/plan.txt")
        except FileNotFoundError:
            return 0.0
        return float(plan.strip() == b"buy cheese" and ANSWER in answer)


@dataclass(frozen=True, slots=True)
class Played:
    """A rollout after its end, as the store has it, beside what the engine saw."""

    rollout: Rollout
    graph: TrajectoryGraph
    calls: Sequence[EngineCall]
    renderer: Renderer
    ledger: Ledger
    unplayed: int = 0
    """Lines of the script that were not asked for."""
    visits: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """How often the gateway was asked, by protocol ("http", "websocket") and path."""

    def prompt(self, call: int) -> str:
        return self.renderer.decode(self.calls[call].prompt_ids)


@dataclass(frozen=True, slots=True)
class Model:
    """What stands behind the gateway. The engine is started and stopped with the stage."""

    renderer: Renderer
    engine: Engine


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms a rollout is run."""

    policy: SessionPolicy = field(default_factory=SessionPolicy)
    task: Task = TASK
    context_length: int = 0
    """What the agent is told; 0: nothing."""
    timeout_s: float = TIMEOUT_S


def hermes(name: str, arguments: Mapping[str, Any]) -> str:
    """A tool call as the tiny model's template writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def require(agent: str) -> None:
    """Skips where the agent was not fetched."""
    if cached_agent(agent) is None:
        pytest.skip(f"agent {agent} is not fetched: make agents")


def play(folder: Path, agent: str, script: Sequence[str | ScriptLine], terms: Terms = Terms()) -> Played:
    """Runs the agent on the task against a script."""
    renderer = Renderer.from_folder(make_tokenizer(folder / "model"))
    lines = [line if isinstance(line, ScriptLine) else ScriptLine(text=line) for line in script]
    engine = ScriptedEngine(
        lines, encode=renderer.encode_answer, decode=renderer.decode, context_length=CONTEXT_LENGTH, tokens_per_chunk=64
    )
    played = play_with(folder, agent, Model(renderer, engine), terms)
    return replace(played, unplayed=engine.remaining)


def play_with(folder: Path, agent: str, model: Model, terms: Terms) -> Played:
    """Runs the agent on the task against an engine."""
    require(agent)

    async def body() -> Played:
        recorded = RecordingEngine(model.engine)
        store = TrajectoryStore(folder / "trajectories.db")
        try:
            gateway = Gateway(model.renderer, recorded, store, model_name="tiny")
            door = _Door(gateway.app)
            await recorded.start()
            async with serve_app(door, unix_socket=folder / SOCKET):
                ended = await _run(gateway, store, folder, agent, terms)
            return replace(_look(ended, store, recorded.calls, model.renderer), visits=door.visits)
        finally:
            await recorded.stop()
            store.close()

    return asyncio.run(asyncio.wait_for(body(), terms.timeout_s + TIMEOUT_S))


class _Door:
    """Counts who comes in. An ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self.visits: Counter[tuple[str, str]] = Counter()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.visits[scope["type"], scope["path"]] += 1
        await self._app(scope, receive, send)


async def _run(gateway: Gateway, store: TrajectoryStore, folder: Path, agent: str, terms: Terms) -> Rollout:
    sandboxes = NamespaceBackend()
    agents = LaunchedAgent(agent)
    spec = agents.furnish(SandboxSpec(), str(folder / SOCKET))
    stage = Stage(gateway, ToolServer(()), sandboxes, spec, agents, Files(), store)
    addresses = Addresses("", "", "tiny", terms.context_length)
    rollout = Rollout("r1", terms.task.id, "g1", instruction=terms.task.instruction)
    try:
        runner = RolloutRunner(stage, addresses, Limits(1, terms.timeout_s, 5.0))
        return await runner.run(Attempt(terms.task, rollout, terms.policy))
    finally:
        await sandboxes.stop()


def _look(ended: Rollout, store: TrajectoryStore, calls: Sequence[EngineCall], renderer: Renderer) -> Played:
    """Credits the rollout in a group with an attempt that did nothing, and reads everything back from the store."""
    idle = Rollout("r2", TASK.id, "g1", status=RolloutStatus.FINISHED, reward=0.0)
    store.create_rollout(idle)
    graph = store.graph(ended.id)
    group = [ScoredRollout(ended, graph), ScoredRollout(idle, store.graph(idle.id))]
    store.record_step(0, grpo_credit({"g1": group}, AlgorithmConfig()))
    return Played(ended, graph, calls, renderer, store.ledger())


def check_exact(played: Played) -> None:
    """Every answer stands in the graph below exactly the tokens that the engine got, once, and is accounted for."""
    graph, calls = played.graph, [call for call in played.calls if call.answer_ids]
    answers = [node for node in graph.nodes if node.num_sampled]
    paths = Counter(tuple(graph.path_ids(node.id).tolist()) for node in answers)
    assert paths == Counter((*call.prompt_ids, *call.answer_ids) for call in calls)
    sampled = Counter(
        (tuple(node.token_ids[node.sampled].tolist()), node.logprobs[node.sampled].tobytes()) for node in answers
    )
    assert sampled == Counter((tuple(call.answer_ids), np.array(call.logprobs, np.float32).tobytes()) for call in calls)
    check_closed(played.ledger, "the agent's rollout")
    assert played.ledger.sampled == sum(len(call.answer_ids) for call in calls)


def check_done(played: Played) -> None:
    """The agent did in the sandbox what the script asked for, to the end of the script, and its answer came back."""
    assert (played.rollout.status, played.rollout.reward) == (RolloutStatus.FINISHED, 1.0), played.rollout.reason
    assert played.unplayed == 0
    # Not of the last call: a sub-agent in the background may end after the main agent.
    assert any(SECRET in played.prompt(call) for call in range(len(played.calls)))
