"""What one process of benchmarks/step_vs_trl.py is asked to do and what it answers; both environments import it.

Nothing but the standard library, since TRL's environment has no upspiral.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

PROMPTS, COMPLETIONS, NEW_TOKENS, RESULT_TOKENS = 4, 8, 64, 64
LEARNING_RATE, MAX_GRAD_NORM, BETAS = 2e-5, 1.0, (0.9, 0.95)
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
TEMPERATURE, SEED = 1.0, 0

Row = Literal["completion", "rollout", "call"]
"""What is one row of TRL's batch. "completion": what its trainer generates by itself; "rollout": all calls of an agent
and the results between them, those masked; "call": the history that a call sent and what it sampled."""


@dataclass(frozen=True, slots=True)
class Job:
    model_folder: str
    dtype: str
    prompts: Sequence[Sequence[int]]
    prompt_texts: Sequence[str]
    result_ids: Sequence[int]
    """Tokens of which tool results are cut."""
    calls: int
    """Of the model by each rollout, NEW_TOKENS each; a tool result stands between two."""
    repeats: int
    row: Row = "completion"
    rows_per_pass: int = 0
    """Of TRL: how many rows go forward and backward at once."""
    clock: Literal["wall", "cpu"] = "wall"
    budget_s: float = 150.0
    """A process whose steps have taken longer together takes no further one, once one of them counts."""

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter() if self.clock == "wall" else time.process_time()

    def result(self, rollout: int, turn: int) -> list[int]:
        """RESULT_TOKENS tokens that no other rollout and no other turn begins with."""
        start = (97 * rollout + 31 * turn) % (len(self.result_ids) - RESULT_TOKENS)
        return list(self.result_ids[start : start + RESULT_TOKENS])

    @property
    def warm_ups(self) -> int:
        """Steps before those that are timed. A step with a row for each call takes minutes: it needs none."""
        return 0 if self.row == "call" else 1

    @property
    def longest_history(self) -> int:
        """Tokens that the last call sends."""
        return max(len(prompt) for prompt in self.prompts) + (self.calls - 1) * (NEW_TOKENS + RESULT_TOKENS)

    def with_rows(self, rows_per_pass: int) -> Job:
        return replace(self, rows_per_pass=rows_per_pass)

    @classmethod
    def read(cls) -> Job:
        return cls(**json.load(sys.stdin))

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def reward(sampled: Sequence[int]) -> float:
    """The share of even token ids: as good as any, costs nothing and differs within every group."""
    return sum(token % 2 == 0 for token in sampled) / len(sampled)


def answer(job: Job, steps: Sequence[Mapping[str, float]]) -> None:
    """Prints the medians over the timed steps and the process's peak, and ends the process."""
    timed = steps[job.warm_ups :]
    figures = {name: round(statistics.median(step[name] for step in timed), 3) for name in timed[0]}
    figures["timed_steps"] = len(timed)
    figures["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(figures), flush=True)
    os._exit(0)  # engines leave threads behind
