"""An agent that is a command line, started inside the rollout's sandbox.

It finds the model at OPENAI_BASE_URL with OPENAI_API_KEY, the model's name in OPENAI_MODEL and the task's text in
UPSPIRAL_INSTRUCTION (and on stdin). What it prints to stdout is its answer. Its tools are the sandbox it runs in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from upspiral.agent.base import AgentTask
from upspiral.errors import AgentError, DeadlineError
from upspiral.sandbox.base import Command, Sandbox, SandboxSpec

GATEWAY_PORT = 8417
"""Loopback port inside the sandbox that leads to the gateway."""


class CommandAgent:
    """Satisfies AgentRunner."""

    def __init__(self, command: str) -> None:
        self._command = command

    def furnish(self, spec: SandboxSpec, gateway_socket: str) -> SandboxSpec:
        return with_gateway(spec, gateway_socket)

    async def start(self) -> None:
        return

    async def stop(self) -> None:
        return

    async def run(self, task: AgentTask, sandbox: Sandbox, *, timeout_s: float) -> str:
        environment = {
            "OPENAI_BASE_URL": f"http://127.0.0.1:{GATEWAY_PORT}/v1",
            "OPENAI_API_KEY": task.api_key,
            "OPENAI_MODEL": task.model,
            "UPSPIRAL_INSTRUCTION": task.instruction,
        }
        return await answer_of(self._command, task, environment, sandbox, timeout_s)


def with_gateway(spec: SandboxSpec, gateway_socket: str) -> SandboxSpec:
    """Adds the port that leads to the gateway."""
    return replace(spec, forward_sockets={**spec.forward_sockets, GATEWAY_PORT: gateway_socket})


async def answer_of(
    command: str, task: AgentTask, environment: Mapping[str, str], sandbox: Sandbox, timeout_s: float
) -> str:
    """What a command prints that gets the task's instruction on stdin. Raises what AgentRunner.run raises."""
    what = Command(command, stdin=task.instruction.encode(), env=environment)
    result = await sandbox.exec(what, timeout_s=timeout_s)
    if result.timed_out:
        raise DeadlineError(f"the agent's command did not end within {timeout_s:g} s")
    if result.exit_code != 0:
        last_words = result.stderr.decode(errors="replace").strip()[-500:] or "it printed nothing to stderr"
        raise AgentError(f"the agent's command exited with {result.exit_code}: {last_words}")
    return result.stdout.decode(errors="replace").strip()
