"""What an agent is given, and who runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from upspiral.sandbox.base import Sandbox, SandboxSpec


@dataclass(frozen=True, slots=True)
class AgentTask:
    """Plain data for one rollout. An agent reads the attributes; it needs nothing of upspiral.

    The agent talks to the model at `base_url` with `api_key` (any OpenAI client does) and acts through the tools at
    `tools_url` with `tools_key`: `GET tools_url` lists them as function schemas, `POST tools_url/NAME` with the
    arguments as a JSON object calls one.
    """

    id: str
    instruction: str
    model: str
    base_url: str
    api_key: str
    tools_url: str
    tools_key: str
    context_length: int = 0
    """The most tokens that a prompt plus its completion may have; 0: not known."""


class AgentRunner(Protocol):
    """Starts agents."""

    def furnish(self, spec: SandboxSpec, gateway_socket: str) -> SandboxSpec:
        """The spec of a rollout's sandbox with what the agent needs in it: for one that runs inside a way to the
        gateway, which listens on the unix socket of that path."""
        ...

    async def run(self, task: AgentTask, sandbox: Sandbox, *, timeout_s: float) -> str:
        """The agent's answer. Raises AgentError when the agent crashes, DeadlineError when it does not end in time."""
        ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...
