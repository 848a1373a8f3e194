"""Tasks and verifiers. A task asks for something; the environment that made it knows the truth.

The agent sees only `Task.instruction` and the sandbox. `Task.files` are laid out in the sandbox; `truth` stays here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from upspiral.sandbox.base import Sandbox
from upspiral.types import ToolSpec


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to do. Made from a seed: the same environment, split and index give the same task."""

    id: str
    split: str
    kind: str
    """The sort of question, for metrics by kind."""
    difficulty: int
    """Tool calls that the oracle needs."""
    instruction: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    truth: Mapping[str, Any] = field(default_factory=dict)
    """What the verifier knows. Never shown to the agent or to its worker process."""


@dataclass(frozen=True, slots=True)
class DemonstrationTurn:
    """One oracle action: a tool call, or the final answer when `command` is None."""

    command: str | None
    answer: str = ""


class Environment(Protocol):
    """A source of tasks with the verifier that judges them."""

    @property
    def tools(self) -> Sequence[ToolSpec]: ...

    def task(self, split: str, index: int) -> Task:
        """Task number `index` of "train" or "heldout". Unbounded for train."""
        ...

    def demonstrate(self, task: Task) -> Sequence[DemonstrationTurn]:
        """What an oracle would do; the last turn is the answer."""
        ...

    async def verify(self, task: Task, answer: str, sandbox: Sandbox) -> float:
        """Reward in [0, 1] for the agent's answer and what it left in the sandbox. Runs after the agent stopped,
        outside its reach. Raises SandboxError when the sandbox broke."""
        ...
