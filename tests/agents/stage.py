"""Everything that a launched agent meets, for real but for the engine: launcher, sandbox, gateway on a unix socket,
store, verifier, credit. The task is made of file operations, so that the sandbox shows whether they were done."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.fixtures.live_gateway import LiveGateway, live_gateway
from upspiral.agent.command import GATEWAY_PORT
from upspiral.agent.launched import LaunchedAgent
from upspiral.agent.packages import cached_agent
from upspiral.algorithm.base import ScoredRollout
from upspiral.algorithm.grpo import grpo_credit
from upspiral.config.models import AlgorithmConfig
from upspiral.engine.scripted import ScriptedCall, ScriptLine
from upspiral.env.base import DemonstrationTurn, Task
from upspiral.env.tool_server import ToolServer
from upspiral.gateway.http import serve_app
from upspiral.gateway.request import SessionPolicy
from upspiral.loop.rollouts import Addresses, Attempt, Limits, RolloutRunner, Stage
from upspiral.rendering.renderer import Renderer
from upspiral.sandbox.base import Sandbox
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.ledger import check_closed
from upspiral.types import Ledger, Rollout, RolloutStatus, ToolSpec

CONTEXT_LENGTH = 400_000
"""The tiny tokenizer makes a token of every two or three characters, and system prompts have up to 100 kB."""
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
    calls: Sequence[ScriptedCall]
    renderer: Renderer
    ledger: Ledger
    unplayed: int
    visits: Mapping[tuple[str, str], int]
    """How often the gateway was asked, by protocol ("http", "websocket") and path."""

    def prompt(self, call: int) -> str:
        return self.renderer.decode(self.calls[call].prompt_ids)


def hermes(name: str, arguments: Mapping[str, Any]) -> str:
    """A tool call as the tiny model's template writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def require(agent: str) -> None:
    """Skips where the agent was not fetched."""
    if cached_agent(agent) is None:
        pytest.skip(f"agent {agent} is not fetched: make agents")


def play(folder: Path, agent: str, script: Sequence[str | ScriptLine], *, context_length: int = 0) -> Played:
    """Runs the agent on the task against a script. `context_length` is what the agent is told; 0: nothing."""
    require(agent)

    async def body() -> Played:
        async with live_gateway(folder, script, context_length=CONTEXT_LENGTH, tokens_per_chunk=64) as live:
            door = _Door(live.gateway.app)
            ended = await _run(live, folder, agent, context_length, door)
            return _look(live, ended, door.visits)

    return asyncio.run(asyncio.wait_for(body(), 2 * TIMEOUT_S))


class _Door:
    """Counts who comes in. An ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self.visits: Counter[tuple[str, str]] = Counter()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.visits[scope["type"], scope["path"]] += 1
        await self._app(scope, receive, send)


async def _run(live: LiveGateway, folder: Path, agent: str, context_length: int, door: _Door) -> Rollout:
    sandboxes, agents, environment = NamespaceBackend(), LaunchedAgent(agent), Files()
    stage = Stage(live.gateway, ToolServer(()), sandboxes, agents, environment, live.store)
    socket = folder / "gateway.sock"
    addresses = Addresses("", "", "tiny", ((GATEWAY_PORT, str(socket)),), context_length)
    rollout = Rollout("r1", TASK.id, "g1", instruction=TASK.instruction)
    try:
        async with serve_app(door, unix_socket=socket):
            runner = RolloutRunner(stage, addresses, Limits(1, TIMEOUT_S, 5.0))
            return await runner.run(Attempt(TASK, rollout, SessionPolicy()))
    finally:
        await sandboxes.stop()


def _look(live: LiveGateway, ended: Rollout, visits: Mapping[tuple[str, str], int]) -> Played:
    """Credits the rollout in a group with an attempt that did nothing, and reads everything back from the store."""
    idle = Rollout("r2", TASK.id, "g1", status=RolloutStatus.FINISHED, reward=0.0)
    live.store.create_rollout(idle)
    graph = live.store.graph(ended.id)
    group = [ScoredRollout(ended, graph), ScoredRollout(idle, live.store.graph(idle.id))]
    live.store.record_step(0, grpo_credit({"g1": group}, AlgorithmConfig()))
    return Played(ended, graph, live.engine.calls, live.renderer, live.store.ledger(), live.engine.remaining, visits)


def check_exact(played: Played) -> None:
    """Every answer stands in the graph below exactly the tokens that the engine got, once, and is accounted for."""
    graph = played.graph
    stored = Counter(tuple(graph.path_ids(node.id).tolist()) for node in graph.nodes if node.num_sampled)
    assert stored == Counter((*call.prompt_ids, *call.answer_ids) for call in played.calls)
    sampled = Counter(tuple(node.token_ids[node.sampled].tolist()) for node in graph.nodes if node.num_sampled)
    assert sampled == Counter(call.answer_ids for call in played.calls)
    check_closed(played.ledger, "the agent's rollout")
    assert played.ledger.sampled == sum(len(call.answer_ids) for call in played.calls)


def check_done(played: Played) -> None:
    """The agent did in the sandbox what the script asked for, to the end of the script, and its answer came back."""
    assert (played.rollout.status, played.rollout.reward) == (RolloutStatus.FINISHED, 1.0), played.rollout.reason
    assert played.unplayed == 0
    assert SECRET in played.prompt(len(played.calls) - 1)
