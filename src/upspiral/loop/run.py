"""A run: collect -> credit -> pack -> step -> publish, with evaluation, checkpoints and resume.

The whole of a run lies in its folder (DESIGN section 4). What it does not do: run collection and training at the same
time. On one machine both want the same cores; the engine is paused while the trainer computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upspiral.algorithm.grpo import grpo_credit
from upspiral.config.models import RunConfig
from upspiral.eval.heldout import evaluation_line
from upspiral.loop.assembly import Parts, assemble
from upspiral.loop.budget import Budget
from upspiral.loop.clock import Clock
from upspiral.loop.collect import Collector, OnProgress
from upspiral.loop.folder import RunFolder
from upspiral.loop.placement import Placement, num_lanes
from upspiral.loop.staleness import check_versions
from upspiral.loop.step_line import step_line
from upspiral.loop.token_count import TokenCount
from upspiral.loop.warm_start import successful, warm_start_steps
from upspiral.monitor.environment import write_environment
from upspiral.monitor.lines import ledger_line
from upspiral.monitor.metrics import MetricsLog
from upspiral.monitor.progress import Progress
from upspiral.trainer.base import StepKind
from upspiral.trainer.checkpoint import latest_checkpoint, step_of
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.ledger import check_closed
from upspiral.types import RolloutCredit


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    folder: Path
    steps: int
    evaluations: Sequence[dict[str, Any]]
    """The metric lines of the evaluations, first to last."""
    stopped: str = ""
    """Why it stopped before its last step; empty when it did not."""


def run_training(
    config: RunConfig, run_folder: Path, *, resume: bool, progress: Progress, placement: Placement | None = None
) -> RunResult:
    """Runs, or resumes, a training run; `placement` says where, None: here. Raises UpspiralError for anything the user
    can mend."""
    folder = RunFolder.open(run_folder, config, resume=resume)
    try:
        write_environment(folder.path)
        return asyncio.run(_run(config, folder, progress, placement))
    finally:
        folder.close()


async def _run(config: RunConfig, folder: RunFolder, progress: Progress, placement: Placement | None) -> RunResult:
    with progress:
        async with assemble(config, folder, progress, placement) as parts:
            folder.begin(config)
            return await Run(config, folder, parts, progress).train()


class Run:
    """The state of a run in progress. Step s of 1 ... `config.steps` turns policy version s - 1 into version s."""

    def __init__(self, config: RunConfig, folder: RunFolder, parts: Parts, progress: Progress) -> None:
        self._config = config
        self._folder = folder
        self._parts = parts
        self._progress = progress
        self._collector = Collector(config, parts)
        self._metrics = MetricsLog(folder.path)
        self._evaluations: list[dict[str, Any]] = []
        self._budget = Budget(config.budget_minutes)

    async def train(self) -> RunResult:
        done = await self._restore_or_warm_start()
        await self._measure(done)
        while done < self._config.steps and self._budget.allows_a_step():
            done += 1
            await self._train_step(done)
            await self._keep(done)
            await self._measure(done)
        stopped = "" if done == self._config.steps else self._budget.reason
        if stopped:
            await self._keep(done, due=True)
            await self._measure(done, due=True)
        self._metrics.note(done, stopped or "finished", finished=True)
        return RunResult(self._folder.path, done, self._evaluations, stopped)

    async def _keep(self, step: int, *, due: bool = False) -> None:
        if due or self._is_due(step, self._config.checkpoint.every):
            await self._checkpoint(step)

    async def _measure(self, step: int, *, due: bool = False) -> None:
        if self._config.eval.tasks and (due or self._is_due(step, self._config.eval.every)):
            await self._evaluate(step)

    def _is_due(self, step: int, every: int) -> bool:
        return step in (0, self._config.steps) or (every > 0 and step % every == 0)

    async def _train_step(self, step: int) -> None:
        clock = Clock()
        count = TokenCount(self._parts.engine, self._parts.gateway)
        groups = await self._collector.train_groups(step, self._on_rollouts("collecting rollouts"))
        clock.lap("collect")
        credits = grpo_credit(groups, self._config.algorithm)
        graphs = {one.rollout.id: one.graph for group in groups.values() for one in group}
        check_versions((graphs[credit.rollout_id] for credit in credits), step - 1, self._parts.store)
        batches = self._pack(graphs, credits)
        trained = await self._optimize(batches, version=step, kind="policy")
        clock.lap("train")
        clock.split("publish", of="train", seconds=self._parts.learner.publish_s)
        self._parts.store.record_step(step, credits)
        ledger = self._parts.store.ledger(step=step, split="train") + count.unrecorded()
        check_closed(ledger, f"step {step}")
        clock.lap("record")
        line = step_line(groups, credits, trained, clock.seconds) | {
            "version": step,
            "ledger": ledger_line(ledger),
        }
        self._budget.step_took(clock.seconds["total"])
        self._progress.step(self._metrics.append("step", step, line))

    def _pack(self, graphs: Mapping[str, TrajectoryGraph], credits: Sequence[RolloutCredit]) -> list[ForestBatch]:
        trainer = self._config.trainer
        return pack(
            [(graphs[credit.rollout_id], credit) for credit in credits],
            tokens_per_microbatch=trainer.tokens_per_microbatch,
            minibatches=trainer.minibatches,
            lanes=num_lanes(self._config),
            apart=trainer.kind != "local",
        )

    async def _optimize(
        self, batches: Sequence[ForestBatch], *, version: int | None, kind: StepKind, lr: float | None = None
    ) -> dict[str, Any]:
        self._progress.phase("training", 0, len(batches))

        trained = await self._parts.learner.step(batches, version=version, kind=kind, lr=lr)
        return trained.flat()

    async def _evaluate(self, step: int) -> None:
        clock = Clock()
        count = TokenCount(self._parts.engine, self._parts.gateway)
        judged = await self._collector.evaluate(step, self._on_rollouts("evaluating on held-out tasks"))
        clock.lap("evaluate")
        line = evaluation_line(judged) | {
            "version": self._parts.engine.version,
            "temperature": self._config.eval.temperature,
            "seconds": clock.seconds["total"],
            "ledger": ledger_line(self._parts.store.ledger(step=step, split="eval") + count.unrecorded()),
        }
        self._budget.evaluation_took(clock.seconds["total"])
        self._evaluations.append(self._metrics.append("eval", step, line))
        self._progress.evaluation(self._evaluations[-1])

    async def _restore_or_warm_start(self) -> int:
        """Steps that are already done."""
        self._collector.abandon_interrupted()
        checkpoint = latest_checkpoint(self._folder.checkpoints)
        if checkpoint is None:
            await self._warm_start()
            await self._parts.learner.publish(0)
            await self._checkpoint(0)
            return 0
        done = step_of(checkpoint)
        await self._parts.learner.load(checkpoint, version=done)
        for step in range(1, done + 1):
            self._collector.recall(step)
        self._metrics.resumed(done + 1)
        self._progress.note(f"resumed after step {done}")
        return done

    async def _warm_start(self) -> None:
        settings = self._config.warm_start
        if not settings.demonstrations:
            return
        clock = Clock()
        shown = successful(await self._collector.demonstrations(self._on_rollouts("collecting demonstrations")))
        clock.lap("collect")
        losses = []
        for lr, batches in warm_start_steps(shown, self._config, lanes=num_lanes(self._config)):
            trained = await self._optimize(batches, version=None, kind="sft", lr=lr)
            losses.append(trained["loss"])
        clock.lap("train")
        await self._parts.learner.forget_moments()
        line = {"demonstrations": len(shown), "steps": len(losses), "losses": losses, "seconds": clock.seconds}
        self._metrics.append("warm_start", 0, line)
        self._progress.note(f"warm start: {len(shown)} demonstrations, loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    async def _checkpoint(self, step: int) -> None:
        self._progress.phase("writing a checkpoint")
        await self._parts.learner.save(self._folder.checkpoints, step, keep=self._config.checkpoint.keep)

    def _on_rollouts(self, phase: str) -> OnProgress:
        return lambda done, started: self._progress.phase(phase, done, started)
