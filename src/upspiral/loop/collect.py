"""Which rollouts to start: groups with active sampling for training, held-out tasks for evaluation, demonstrations.

Ids, tasks and seeds follow from the run's seed and the step alone, so that a resumed run asks for the same rollouts and
takes those that the store already holds.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from upspiral.algorithm.base import ScoredRollout
from upspiral.algorithm.grpo import has_signal
from upspiral.config.models import RunConfig
from upspiral.engine.scripted import ScriptedEngine, ScriptLine
from upspiral.env.base import Task
from upspiral.errors import LedgerError
from upspiral.eval.heldout import Judged
from upspiral.gateway.session import SessionPolicy
from upspiral.loop.assembly import Parts
from upspiral.loop.curriculum import Curriculum
from upspiral.loop.rollouts import Attempt
from upspiral.loop.verdicts import check_verdicts
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import Rollout, RolloutStatus

EVALUATION, TRAINING, DEMONSTRATION = "eval", "train", "demonstration"
FIRST_DEMONSTRATION = 10_000_000
"""Demonstrations are training tasks from here on, far from those that RL will ever reach."""

OnProgress = Callable[[int, int], None]
"""Called with rollouts done and rollouts started."""
Result = TypeVar("Result")


class Collector:
    """Starts rollouts and gathers them."""

    def __init__(self, config: RunConfig, parts: Parts) -> None:
        self._config = config
        self._environment = parts.environment
        self._renderer = parts.renderer
        self._runner = parts.runner
        self._store = parts.store
        algorithm = config.algorithm
        self._curriculum = Curriculum(
            lambda index: parts.environment.task(TRAINING, index),
            seed=config.seed,
            tasks_per_step=algorithm.max_groups_per_step,
            candidates=algorithm.task_candidates,
        )

    def abandon_interrupted(self) -> None:
        """Marks rollouts that a killed process left running. What they committed stays, and stays out of the loss."""
        self._store.cancel_running("interrupted")

    def recall(self, step: int) -> None:
        """After a restart: takes in what a step that is already trained had sampled."""
        rewards: dict[str, list[float]] = {}
        for rollout in self._store.rollouts(split=TRAINING, step=step):
            if rollout.reward is not None:
                rewards.setdefault(rollout.group_id, []).append(rollout.reward)
        self._observe(step, self._curriculum.choose(step), rewards)

    async def train_groups(self, step: int, on_progress: OnProgress) -> dict[str, list[ScoredRollout]]:
        """The groups of one step. A group without signal is replaced until `groups_per_step` have some or
        `max_groups_per_step` were sampled; every sampled group is returned. Raises RunError when nothing could be
        judged."""
        algorithm = self._config.algorithm
        tasks = self._curriculum.choose(step)
        groups: dict[str, list[ScoredRollout]] = {}
        pending = {self._start_group(step, index, tasks[index]) for index in range(algorithm.groups_per_step)}
        started = len(pending)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for finished in done:
                group_id, rollouts = finished.result()
                groups[group_id] = rollouts
                if not has_signal(rollouts) and started < algorithm.max_groups_per_step:
                    pending.add(self._start_group(step, started, tasks[started]))
                    started += 1
            on_progress(len(groups) * algorithm.group_size, started * algorithm.group_size)
        for each in (each for rollouts in groups.values() for each in rollouts):
            check_recorded(each.rollout, each.graph.num_sampled)
        everyone = [one.rollout for rollouts in groups.values() for one in rollouts]
        check_verdicts(everyone, f"step {step}", self._store)
        self._observe(step, tasks, {name: _rewards(rollouts) for name, rollouts in groups.items()})
        return dict(sorted(groups.items()))

    async def evaluate(self, step: int, on_progress: OnProgress) -> list[Judged]:
        """One rollout of each held-out task under the current policy."""
        settings = self._config.eval
        attempts = []
        for index in range(settings.tasks):
            name = f"eval-{step:04d}-{index:03d}"
            policy = self._policy(settings.temperature, name)
            task = self._environment.task("heldout", index)
            attempts.append(Attempt(task, _rollout(task, name, EVALUATION, step), policy))
        rollouts = await self._gather(attempts, on_progress)
        judged = [
            Judged(attempt.task, rollout, calls=self._num_calls(rollout))
            for attempt, rollout in zip(attempts, rollouts, strict=True)
        ]
        for each in judged:
            check_recorded(each.rollout, each.calls)
        check_verdicts(rollouts, f"evaluation after step {step}", self._store)
        return judged

    async def demonstrations(self, on_progress: OnProgress) -> list[tuple[Rollout, TrajectoryGraph]]:
        """Rollouts of the real agent with the oracle in the engine's place, so that what is learned from has the
        same prompts, tools and templates as what will be sampled."""
        attempts = []
        for index in range(self._config.warm_start.demonstrations):
            task = self._environment.task(TRAINING, FIRST_DEMONSTRATION + index)
            engine = ScriptedEngine(self._oracle_script(task), encode=self._renderer.encode_answer)
            name = f"demo-{index:04d}"
            policy = self._policy(self._config.temperature, name)
            attempts.append(Attempt(task, _rollout(task, name, DEMONSTRATION, 0), policy, engine))
        rollouts = await self._gather(attempts, on_progress)
        return [(rollout, self._store.graph(rollout.id)) for rollout in rollouts]

    def _oracle_script(self, task: Task) -> list[ScriptLine]:
        lines = []
        for turn in self._environment.demonstrate(task):
            if turn.command is None:
                lines.append(ScriptLine(text=turn.answer))
            else:
                call = {"name": "bash", "arguments": {"command": turn.command}}
                lines.append(ScriptLine(text=self._renderer.format_tool_call(call)))
        return lines

    def _observe(self, step: int, tasks: Sequence[Task], rewards: Mapping[str, Sequence[float]]) -> None:
        named = {_group_id(step, index): task for index, task in enumerate(tasks)}
        self._curriculum.observe((named[group_id], of_group) for group_id, of_group in sorted(rewards.items()))

    def _start_group(self, step: int, index: int, task: Task) -> asyncio.Task[tuple[str, list[ScoredRollout]]]:
        return asyncio.create_task(self._group(step, index, task))

    async def _group(self, step: int, index: int, task: Task) -> tuple[str, list[ScoredRollout]]:
        group_id = _group_id(step, index)
        attempts = []
        for member in range(self._config.algorithm.group_size):
            name = f"train-{step:04d}-{index:02d}-{member}"
            policy = self._policy(self._config.temperature, name)
            attempts.append(Attempt(task, replace(_rollout(task, name, TRAINING, step), group_id=group_id), policy))
        rollouts = await asyncio.gather(*(self._run_or_reuse(attempt) for attempt in attempts))
        return group_id, [ScoredRollout(rollout, self._store.graph(rollout.id)) for rollout in rollouts]

    def _policy(self, temperature: float, name: str) -> SessionPolicy:
        agent = self._config.agent
        return SessionPolicy(
            temperature=temperature,
            max_completion_tokens=agent.max_completion_tokens,
            max_calls=agent.max_calls,
            seed=_seed(self._config.seed, name),
            gateway=self._config.gateway,
        )

    async def _gather(self, attempts: Sequence[Attempt], on_progress: OnProgress) -> list[Rollout]:
        done = 0

        async def one(attempt: Attempt) -> Rollout:
            nonlocal done
            rollout = await self._run_or_reuse(attempt)
            done += 1
            on_progress(done, len(attempts))
            return rollout

        return list(await asyncio.gather(*(one(attempt) for attempt in attempts)))

    async def _run_or_reuse(self, attempt: Attempt) -> Rollout:
        """Takes the rollout from the store when an interrupted run has finished it already."""
        name, retries = attempt.rollout.id, 0
        while (known := self._store.find_rollout(attempt.rollout.id)) is not None:
            if known.status is not RolloutStatus.CANCELLED:
                return known
            retries += 1
            attempt = replace(attempt, rollout=replace(attempt.rollout, id=f"{name}-again{retries}"))
        return await self._runner.run(attempt)

    def _num_calls(self, rollout: Rollout) -> int:
        return sum(node.num_sampled > 0 for node in self._store.graph(rollout.id).nodes)


def check_recorded(rollout: Rollout, sampled: int) -> None:
    """Raises LedgerError for a reward that nothing sampled has earned: an agent that talks to another model than ours
    would be graded well and teach nothing."""
    if rollout.reward is not None and sampled == 0:
        raise LedgerError(
            f"rollout {rollout.id} has reward {rollout.reward:g} and no sampled token: its agent did not call the "
            "model at the base URL and key that it was given; point it there and start again"
        )


def _group_id(step: int, index: int) -> str:
    return f"step-{step:04d}-group-{index:02d}"


def _rewards(rollouts: Sequence[ScoredRollout]) -> list[float]:
    return [one.rollout.reward for one in rollouts if one.rollout.reward is not None]


def _rollout(task: Task, name: str, split: str, step: int) -> Rollout:
    """A rollout in a group of its own."""
    return Rollout(name, task.id, name, split=split, step=step, instruction=task.instruction)


def _seed(run_seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{run_seed}/{name}".encode(), digest_size=4).digest(), "big")
