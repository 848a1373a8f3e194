"""What a launcher says about its agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from upspiral.agent.base import AgentTask
from upspiral.agent.command import GATEWAY_PORT
from upspiral.sandbox.base import Limits

FOLDER = "/opt/agent"
"""Where the agent's packages are inside the sandbox, read-only."""
GATEWAY_ORIGIN = f"http://127.0.0.1:{GATEWAY_PORT}"
GATEWAY_URL = f"{GATEWAY_ORIGIN}/v1"

AGENT_LIMITS = Limits(memory_mb=4096, memory_counts="writable", processes=512, file_mb=256, cpu_s=3600)
"""Agents are bigger than the commands that they run. Their rollout's deadline ends those that do not end."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How an agent is started for one task. The task's instruction is its stdin, its stdout is the answer."""

    command: str
    """For bash, in the sandbox's workspace."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Beside HOME, PATH, LANG and TMPDIR there is nothing else in its environment."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Laid out in its home, a folder of its own that is not the workspace and goes when the agent ends."""


class Launcher(Protocol):
    """Knows one agent: how it is told where the model is, to act without asking, and to keep to itself."""

    @property
    def name(self) -> str:
        """As `agent.kind` and packages.toml name it."""
        ...

    def launch(self, task: AgentTask) -> Launch: ...


def auxiliary_model(task: AgentTask) -> str:
    """The model's name for side calls (titles, summaries of tool output) that an agent cannot be kept from: a rule
    of the run can tell them by it, and the gateway answers every name with the same model."""
    return f"{task.model}-auxiliary"
