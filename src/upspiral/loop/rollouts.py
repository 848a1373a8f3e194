"""One rollout from task to reward: sandbox, agent, gateway, verifier.

Infrastructure that fails never becomes a reward: such a rollout ends as failed(reason) with reward None. Only a rollout
whose agent ended, or was cut off by a limit of the run, goes to the verifier.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from upspiral.agent.base import AgentRunner, AgentTask
from upspiral.engine.base import Engine
from upspiral.env.base import Environment, Task
from upspiral.env.tool_server import ToolServer
from upspiral.errors import AgentError, DeadlineError, SandboxError
from upspiral.gateway.server import Gateway
from upspiral.gateway.session import SessionPolicy
from upspiral.sandbox.base import Sandbox, SandboxBackend, SandboxSpec
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Rollout, RolloutStatus

VERIFY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where agents find the gateway and their tools."""

    base_url: str
    tools_url: str
    model: str
    context_length: int = 0
    """Of the model, for agents that manage their context; 0: not known."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rollout may take, and how many run at once."""

    concurrency: int
    timeout_s: float
    command_timeout_s: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """A rollout that is asked for. `engine` overrides the gateway's, for demonstrations."""

    task: Task
    rollout: Rollout
    policy: SessionPolicy
    engine: Engine | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """The standing parts that every rollout uses."""

    gateway: Gateway
    tools: ToolServer
    sandboxes: SandboxBackend
    spec: SandboxSpec
    """What every rollout's sandbox is, and has for the agent. Each gets the files of its task."""
    agents: AgentRunner
    environment: Environment
    store: TrajectoryStore


class RolloutRunner:
    """Runs rollouts, at most `limits.concurrency` at once."""

    def __init__(self, stage: Stage, addresses: Addresses, limits: Limits) -> None:
        self._stage = stage
        self._addresses = addresses
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.concurrency)

    async def run(self, attempt: Attempt) -> Rollout:
        """Runs one rollout to its end and commits how it ended. Never raises for a rollout that fails."""
        async with self._slots:
            ended = await self._attempt(attempt)
        self._stage.store.finish_rollout(
            ended.id, status=ended.status, reason=ended.reason, reward=ended.reward, answer=ended.answer
        )
        return ended

    async def _attempt(self, attempt: Attempt) -> Rollout:
        rollout = attempt.rollout
        key = self._stage.gateway.open_rollout(rollout, policy=attempt.policy, engine=attempt.engine)
        spec = replace(self._stage.spec, files=attempt.task.files, labels={"rollout": rollout.id})
        try:
            async with self._stage.sandboxes.acquire(spec) as sandbox:
                acted = await self._act(attempt, key, sandbox)
                if acted.status is RolloutStatus.FAILED:
                    return acted
                async with asyncio.timeout(VERIFY_TIMEOUT_S):
                    reward = await self._stage.environment.verify(attempt.task, acted.answer, sandbox)
                return replace(acted, reward=reward)
        except SandboxError as error:
            return _failed(rollout, f"sandbox: {error}")
        except TimeoutError:
            return _failed(rollout, f"verifier: no verdict within {VERIFY_TIMEOUT_S:g} s")
        finally:
            await self._stage.gateway.seal_rollout(rollout.id)

    async def _act(self, attempt: Attempt, key: str, sandbox: Sandbox) -> Rollout:
        """Lets the agent act, then seals the rollout so that nothing it left running can add to it."""
        rollout, gateway, tools = attempt.rollout, self._stage.gateway, self._stage.tools
        tools_key = tools.open(sandbox, timeout_s=self._limits.command_timeout_s)
        answer, trouble = "", ""
        try:
            task = self._agent_task(attempt, key, tools_key)
            answer = await self._stage.agents.run(task, sandbox, timeout_s=self._limits.timeout_s)
        except (AgentError, DeadlineError) as error:
            trouble = f"agent: {error}"
        finally:
            broken_tools = tools.failure(tools_key)
            await tools.close(tools_key)
            sealed = await gateway.seal_rollout(rollout.id)
        if broken_tools:
            return _failed(rollout, f"sandbox: {broken_tools}")
        if sealed.failed:
            return _failed(rollout, f"engine: {sealed.failed}")
        if sealed.truncated:
            return replace(rollout, status=RolloutStatus.TRUNCATED, reason=sealed.truncated, answer=answer)
        if trouble:
            return _failed(rollout, trouble)
        return replace(rollout, status=RolloutStatus.FINISHED, answer=answer)

    def _agent_task(self, attempt: Attempt, key: str, tools_key: str) -> AgentTask:
        return AgentTask(
            id=attempt.rollout.id,
            instruction=attempt.task.instruction,
            model=self._addresses.model,
            base_url=self._addresses.base_url,
            api_key=key,
            tools_url=self._addresses.tools_url,
            tools_key=tools_key,
            context_length=self._addresses.context_length,
        )


def _failed(rollout: Rollout, reason: str) -> Rollout:
    return replace(rollout, status=RolloutStatus.FAILED, reason=reason, reward=None)
