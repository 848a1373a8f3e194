"""One rollout from task to reward, and everything that can go wrong on the way: what broke decides whether there is a
reward, and infrastructure never gives one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.fixtures.live_gateway import LiveGateway, live_gateway
from upspiral.agent.base import AgentRunner
from upspiral.agent.command import CommandAgent
from upspiral.agent.pool import WorkerPool
from upspiral.config.models import EnvConfig
from upspiral.env.shell.environment import ShellEnvironment
from upspiral.env.tool_server import ToolServer
from upspiral.gateway.http import serve_app
from upspiral.gateway.session import SessionPolicy
from upspiral.loop.rollouts import Addresses, Attempt, Limits, RolloutRunner, Stage
from upspiral.sandbox.base import SandboxBackend, SandboxSpec
from upspiral.sandbox.fake import FakeBackend, Faults
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.types import Rollout, RolloutStatus

ENVIRONMENT = ShellEnvironment(EnvConfig(levels=(1,), kinds=("count_lines",)))
TASK = ENVIRONMENT.task("train", 0)
EXAMPLE_AGENT = Path(__file__).parents[2] / "examples" / "shell_agent.py"
CALL = '<tool_call>\n{{"name": "bash", "arguments": {{"command": "{}"}}}}\n</tool_call>'
ORACLE = [CALL.format(TASK.truth["commands"][0]), TASK.truth["answer"]]


@dataclass(frozen=True, slots=True)
class Scene:
    live: LiveGateway
    runner: RolloutRunner

    async def run(self, **policy: Any) -> Rollout:
        rollout = Rollout("r1", TASK.id, "g1", instruction=TASK.instruction)
        return await self.runner.run(Attempt(TASK, rollout, SessionPolicy(**policy)))


@asynccontextmanager
async def scene(
    folder: Path, script: list[str], agents: AgentRunner, sandboxes: SandboxBackend, timeout_s: float = 20.0
) -> AsyncIterator[Scene]:
    async with live_gateway(folder, script) as live:
        tools = ToolServer(ENVIRONMENT.tools)
        app = Starlette(routes=[Mount("/agent", app=tools.app), Mount("/", app=live.gateway.app)])
        socket = folder / "gateway.sock"
        spec = agents.furnish(SandboxSpec(), str(socket))
        stage = Stage(live.gateway, tools, sandboxes, spec, agents, ENVIRONMENT, live.store)
        async with serve_app(app) as url, serve_app(app, unix_socket=socket):
            await agents.start()
            try:
                addresses = Addresses(f"{url}/v1", f"{url}/agent/tools", "tiny")
                yield Scene(live, RolloutRunner(stage, addresses, Limits(4, timeout_s, 5.0)))
            finally:
                await agents.stop()
                await sandboxes.stop()


def python_agent(folder: Path, source: str) -> WorkerPool:
    path = folder / "agent.py"
    path.write_text(source)
    return WorkerPool(path, workers=1)


def play(
    folder: Path,
    script: list[str],
    agents: AgentRunner,
    *,
    sandboxes: Callable[[], SandboxBackend] = FakeBackend,
    timeout_s: float = 20.0,
    **policy: int,
) -> Rollout:
    """Runs the one rollout and checks that the store says of it what the runner said."""

    async def body() -> Rollout:
        async with scene(folder, script, agents, sandboxes(), timeout_s) as stage:
            ended = await stage.run(**policy)
            stored = stage.live.store.rollout("r1")
            assert (stored.status, stored.reward, stored.reason) == (ended.status, ended.reward, ended.reason)
            return ended

    return asyncio.run(asyncio.wait_for(body(), 60))


def test_the_oracle_is_rewarded_in_the_real_sandbox(tmp_path: Path) -> None:
    agents = WorkerPool(EXAMPLE_AGENT, workers=1)
    ended = play(tmp_path, ORACLE, agents, sandboxes=NamespaceBackend)
    assert (ended.status, ended.reward, ended.answer) == (RolloutStatus.FINISHED, 1.0, TASK.truth["answer"])


def test_a_wrong_answer_is_a_verdict(tmp_path: Path) -> None:
    ended = play(tmp_path, ["no idea"], WorkerPool(EXAMPLE_AGENT, workers=1))
    assert (ended.status, ended.reward) == (RolloutStatus.FINISHED, 0.0)


def test_a_tool_call_that_is_no_json_is_an_ordinary_wrong_answer(tmp_path: Path) -> None:
    broken = '<tool_call>\n{"name": "bash", "arguments": {"command": }\n</tool_call>'
    ended = play(tmp_path, [broken], WorkerPool(EXAMPLE_AGENT, workers=1))
    assert (ended.status, ended.reward) == (RolloutStatus.FINISHED, 0.0)
    assert "<tool_call>" in ended.answer


def test_too_many_calls_truncate_and_are_judged(tmp_path: Path) -> None:
    ended = play(tmp_path, [ORACLE[0]] * 5, WorkerPool(EXAMPLE_AGENT, workers=1), max_calls=2)
    assert (ended.status, ended.reason, ended.reward) == (RolloutStatus.TRUNCATED, "max_calls", 0.0)


@pytest.mark.parametrize("faults", [Faults(start_failures=1), Faults(break_at=0)])
def test_a_broken_sandbox_gives_no_reward(tmp_path: Path, faults: Faults) -> None:
    agents = WorkerPool(EXAMPLE_AGENT, workers=1)
    ended = play(tmp_path, ORACLE, agents, sandboxes=lambda: FakeBackend(faults=faults))
    assert (ended.status, ended.reward) == (RolloutStatus.FAILED, None)
    assert ended.reason.startswith("sandbox: ")


def test_a_broken_engine_gives_no_reward(tmp_path: Path) -> None:
    ended = play(tmp_path, [], WorkerPool(EXAMPLE_AGENT, workers=1))
    assert (ended.status, ended.reward) == (RolloutStatus.FAILED, None)
    assert ended.reason.startswith("engine: ")


def test_an_agent_that_crashes_gives_no_reward(tmp_path: Path) -> None:
    ended = play(tmp_path, [], python_agent(tmp_path, "async def agent(task):\n    raise RuntimeError('boom')\n"))
    assert (ended.status, ended.reward) == (RolloutStatus.FAILED, None)
    assert "agent: the agent crashed: RuntimeError: boom" in ended.reason


def test_an_agent_that_hangs_gives_no_reward(tmp_path: Path) -> None:
    source = "import asyncio\nasync def agent(task):\n    await asyncio.sleep(100)\n"
    ended = play(tmp_path, [], python_agent(tmp_path, source), timeout_s=0.5)
    assert (ended.status, ended.reward) == (RolloutStatus.FAILED, None)
    assert "0.5 s" in ended.reason


def test_a_dead_key_is_refused_and_the_agent_is_told(tmp_path: Path) -> None:
    source = EXAMPLE_AGENT.read_text().replace("api_key=task.api_key", "api_key='sk-dead'")
    ended = play(tmp_path, ORACLE, python_agent(tmp_path, source))
    assert (ended.status, ended.reward) == (RolloutStatus.FAILED, None)
    assert "401" in ended.reason


COMMAND_AGENT = r"""
python3 - <<'PY'
import json, os, subprocess, urllib.request
messages = [{"role": "user", "content": os.environ["UPSPIRAL_INSTRUCTION"]}]
tool = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object", "properties": {}}}}
while True:
    body = {"model": os.environ["OPENAI_MODEL"], "messages": messages, "tools": [tool]}
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
        {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"})
    message = json.load(urllib.request.urlopen(request, timeout=10))["choices"][0]["message"]
    messages.append(message)
    if not message.get("tool_calls"):
        print(message["content"])
        break
    for call in message["tool_calls"]:
        command = json.loads(call["function"]["arguments"])["command"]
        output = subprocess.run(command, shell=True, capture_output=True, text=True).stdout.strip()
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": output})
PY
"""


def test_a_command_line_agent_inside_the_sandbox_reaches_only_the_gateway(tmp_path: Path) -> None:
    ended = play(tmp_path, ORACLE, CommandAgent(COMMAND_AGENT), sandboxes=NamespaceBackend)
    assert (ended.status, ended.reward) == (RolloutStatus.FINISHED, 1.0), ended.reason


def test_a_command_line_agent_that_fails_says_its_last_words(tmp_path: Path) -> None:
    ended = play(tmp_path, [], CommandAgent("echo alas >&2; exit 3"), sandboxes=NamespaceBackend)
    assert (ended.status, ended.reward) == (RolloutStatus.FAILED, None)
    assert "exited with 3: alas" in ended.reason
