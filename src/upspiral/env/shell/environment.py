"""Shell tasks, made from a seed, and the verifier that judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from upspiral.config.models import EnvConfig
from upspiral.env.base import DemonstrationTurn, Task
from upspiral.env.shell.compose import compose
from upspiral.env.shell.repertoire import LEVELS, Repertoire, Shape
from upspiral.env.shell.vocabulary import BY_SPLIT
from upspiral.errors import ConfigError
from upspiral.sandbox.base import Sandbox
from upspiral.types import ToolSpec

_BASH = ToolSpec(
    name="bash",
    description="Runs a shell command.",
    parameters={"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
)

_LEVEL_SHARES = {1: 8, 2: 7, 3: 5, 4: 4}
"""So many tasks in a cycle have this difficulty: with levels 1 to 3, three of five tasks need two or more calls."""

_STRIDE = 7
"""Walks through the cycle of levels in mixed order; coprime to every sum of shares below."""


class ShellEnvironment:
    """Questions about generated files. Task (seed, split, index) is always the same.

    The reward is 1 when the answer is exactly right, white space aside, and the files are as the task wants them;
    otherwise 0. Nothing that the agent wrote is ever run: the verifier only reads files.
    """

    def __init__(self, config: EnvConfig):
        unknown = sorted(set(config.levels) - set(LEVELS))
        if unknown or not config.levels:
            raise ConfigError(f'env.levels = {list(config.levels)}: choose from {list(LEVELS)} for env.kind = "shell"')
        self._repertoire = Repertoire.named(config.kinds, config.shapes)
        possible = {shape.difficulty for shape in self._repertoire.shapes}
        if empty := sorted(set(config.levels) - possible):
            raise ConfigError(
                f"env.levels = {list(config.levels)}: env.kinds and env.shapes leave nothing of level {empty}; "
                f"they reach {sorted(possible)}"
            )
        self._seed = config.seed
        self._cycle = [level for level in sorted(set(config.levels)) for _ in range(_LEVEL_SHARES[level])]

    @property
    def tools(self) -> Sequence[ToolSpec]:
        return (_BASH,)

    def task(self, split: str, index: int) -> Task:
        """Task number `index` >= 0 of "train" or "heldout"."""
        if split not in BY_SPLIT:
            raise ConfigError(f"the shell environment has no split {split!r}; choose from {sorted(BY_SPLIT)}")
        rng = Random(f"{self._seed}/{split}/{index}")
        shape = self._shape(rng, index)
        composition = compose(rng, split, shape, self._repertoire)
        return Task(
            id=f"shell-{self._seed}-{split}-{index}",
            split=split,
            kind=composition.kinds[0] if shape.difficulty == 1 else shape.name,
            difficulty=shape.difficulty,
            instruction=composition.instruction,
            files={path: text.encode() for path, text in composition.files.items()},
            truth=composition.truth(),
        )

    def _shape(self, rng: Random, index: int) -> Shape:
        level = self._cycle[index * _STRIDE % len(self._cycle)]
        shapes = [shape for shape in self._repertoire.shapes if shape.difficulty == level]
        return rng.choices(shapes, weights=[shape.weight for shape in shapes])[0]

    def demonstrate(self, task: Task) -> Sequence[DemonstrationTurn]:
        """One simple command a turn, then the answer."""
        commands = [DemonstrationTurn(command) for command in task.truth["commands"]]
        return [*commands, DemonstrationTurn(None, answer=task.truth["answer"])]

    async def verify(self, task: Task, answer: str, sandbox: Sandbox) -> float:
        """1.0 or 0.0. Raises SandboxError when the sandbox broke."""
        if answer.split() != task.truth["answer"].split():
            return 0.0
        return 1.0 if await _files_are_right(sandbox, task.truth["after"]) else 0.0


async def _files_are_right(sandbox: Sandbox, wanted: Mapping[str, Any]) -> bool:
    """Whether every named file has the wanted text (None: does not exist). Other files do not matter."""
    for path, text in wanted.items():
        try:
            found = (await sandbox.read(path)).decode(errors="replace")
        except FileNotFoundError:
            found = None
        if _lines(found) != _lines(text):
            return False
    return True


def _lines(text: str | None) -> list[str] | None:
    """Lines without the white space at their ends, and without empty lines at the end of the file."""
    return None if text is None else [line.rstrip() for line in text.rstrip().split("\n")]
