"""Steps of upspiral for benchmarks/step_vs_trl.py, in a process of their own: a job on stdin, figures on stdout.

The parts and their order are those of a run (loop/run.py): the embedded engine samples, trajectory graphs, credit,
pack, the trainer's step on the engine's thread, publish.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from step_job import (
    BETAS,
    CLIP_HIGH,
    CLIP_LOW,
    COMPLETIONS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NEW_TOKENS,
    SEED,
    TEMPERATURE,
    Job,
    answer,
    reward,
)
from upspiral.algorithm.base import ScoredRollout
from upspiral.algorithm.grpo import grpo_credit
from upspiral.config.models import AlgorithmConfig, EngineConfig, TrainerConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.trainer.forest import ForestBatch, pack
from upspiral.trainer.local import LocalTrainer
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import Rollout, SamplingParams
from upspiral.weights.cpu import keep_freed_memory, num_cores
from upspiral.weights.load import load_model


class TimedTrainer(LocalTrainer):
    """Says how long clipping and the optimizer took of its last step."""

    update_s = 0.0
    now: Callable[[], float]

    def _update(self, lr: float, tally: Any) -> None:
        started = self.now()
        super()._update(lr, tally)
        self.update_s = self.now() - started


class Steps:
    def __init__(self, job: Job) -> None:
        torch.manual_seed(SEED)
        torch.set_num_threads(1)  # the engine's thread takes the cores
        keep_freed_memory()
        rollouts = len(job.prompts) * COMPLETIONS
        model = load_model(Path(job.model_folder), dtype=job.dtype, device="cpu")
        self._job = job
        self._algorithm = AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, group_size=COMPLETIONS)
        self._config = TrainerConfig(
            lr=LEARNING_RATE,
            betas=BETAS,
            max_grad_norm=MAX_GRAD_NORM,
            master_weights="none" if job.dtype == "bfloat16" else "float32",
        )
        self._trainer = TimedTrainer(
            model.module, self._config, self._algorithm, temperature=TEMPERATURE, lanes=num_cores()
        )
        self._trainer.now = job.now
        config = EngineConfig(
            max_running=rollouts, cache_slots=rollouts, context_length=job.longest_history + NEW_TOKENS
        )
        self._engine = EmbeddedEngine(model, config, seed=SEED, threads=num_cores())

    async def run(self) -> list[Mapping[str, float]]:
        await self._engine.start()
        return [await self._step(number) for number in range(1, self._job.warm_ups + self._job.repeats + 1)]

    async def _step(self, number: int) -> Mapping[str, float]:
        marks = [self._job.now()]
        groups = await self._collect(number)
        marks.append(self._job.now())
        batches = self._pack(groups)
        marks.append(self._job.now())
        metrics = await self._engine.exclusive(lambda: self._trainer.step(batches))
        marks.append(self._job.now())
        self._engine.publish(number)
        marks.append(self._job.now())
        generate, credit, train, publish = (after - before for before, after in pairwise(marks))
        return {
            "step_s": marks[-1] - marks[0],
            "generate_s": generate,
            "credit_s": credit,
            "forward_backward_s": train - self._trainer.update_s,
            "update_s": self._trainer.update_s,
            "publish_s": publish,
            "computed_tokens": metrics.unique_tokens,
            "trained_tokens": metrics.trained_tokens,
        }

    def _pack(self, groups: dict[str, list[ScoredRollout]]) -> list[ForestBatch]:
        graphs = [one.graph for group in groups.values() for one in group]
        credits = grpo_credit(groups, self._algorithm)
        return pack(
            list(zip(graphs, credits, strict=True)),
            tokens_per_microbatch=self._config.tokens_per_microbatch,
            lanes=num_cores(),
        )

    async def _collect(self, step: int) -> dict[str, list[ScoredRollout]]:
        played = [
            self._play(step, group, group * COMPLETIONS + number)
            for group in range(len(self._job.prompts))
            for number in range(COMPLETIONS)
        ]
        groups: dict[str, list[ScoredRollout]] = {}
        for scored in await asyncio.gather(*played):
            groups.setdefault(scored.rollout.group_id, []).append(scored)
        return groups

    async def _play(self, step: int, group: int, number: int) -> ScoredRollout:
        """One rollout: each call sends the whole history again."""
        graph = TrajectoryGraph(f"step{step}-{number}")
        last = graph.add(None, TokenRun.given(self._job.prompts[group]), role="user", reason="root").id
        sampled: list[int] = []
        for turn in range(self._job.calls):
            if turn:
                result = TokenRun.given(self._job.result(number, turn))
                last = graph.add(last, result, role="tool", reason="append").id
            run = await self._call(graph.path_ids(last).tolist())
            last = graph.add(last, run, role="assistant", reason="append").id
            sampled += run.token_ids.tolist()
        rollout = Rollout(graph.rollout_id, f"task{group}", f"group{group}", step=step, reward=reward(sampled))
        return ScoredRollout(rollout, graph)

    async def _call(self, history: Sequence[int]) -> TokenRun:
        chunks = [
            chunk
            async for chunk in self._engine.generate(
                history, SamplingParams(max_tokens=NEW_TOKENS, temperature=TEMPERATURE)
            )
        ]
        return TokenRun.answer(
            [],
            [token for chunk in chunks for token in chunk.token_ids],
            [logprob for chunk in chunks for logprob in chunk.logprobs],
            [version for chunk in chunks for version in chunk.versions],
            "length",
        )


if __name__ == "__main__":
    asked = Job.read()
    answer(asked, asyncio.run(Steps(asked).run()))
