"""A run folder made through the same classes that a run uses: small, but with everything a report shows."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from zlib import crc32

from tests.fixtures.tiny_model import make_tokenizer
from upspiral.eval.statistics import wilson_interval
from upspiral.monitor.environment import write_environment
from upspiral.monitor.lines import ledger_line
from upspiral.monitor.metrics import MetricsLog
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import (
    Message,
    NodeCredit,
    Rollout,
    RolloutCredit,
    RolloutStatus,
    ToolSpec,
)

BASH = ToolSpec("bash", "Run a shell command.", {"type": "object", "properties": {"command": {"type": "string"}}})
KINDS = ("count lines", "find newest", "sum column")


@dataclass
class RunMaker:
    """Writes a run: `tasks` held-out tasks measured before and after `steps` steps of `groups` groups of four."""

    folder: Path
    steps: int = 3
    tasks: int = 9
    groups: int = 3
    planned: int = 3
    evaluate_after: bool = True
    every: int = 0
    model: str | None = None
    question: str = "How many lines of {} contain ERROR?"
    tool_output: str = "17\n"
    rng: random.Random = field(default_factory=lambda: random.Random(4))

    def make(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        model = self.folder.parent / "model"
        make_tokenizer(model)
        (model / "config.json").write_text("{}")
        self.renderer = Renderer.from_folder(model)
        path = json.dumps(self.model or str(model))
        config = f'name = "demo"\nsteps = {self.planned}\n[model]\npath = {path}\n[eval]\ntasks = {self.tasks}\n'
        (self.folder / "config.resolved.toml").write_text(config)
        write_environment(self.folder)
        self.store = TrajectoryStore(self.folder / "trajectories.db")
        with MetricsLog(self.folder) as log:
            log.append("warm_start", 0, {"demonstrations": 48, "epochs": 1, "loss": 0.8123, "seconds": 31.5})
            log.note(0, "template check passed <b>&</b>")
            self._evaluate(log, 0)
            for step in range(1, self.steps + 1):
                self._step(log, step)
                if self.every and step % self.every == 0 and step < self.steps:
                    self._evaluate(log, step)
            if self.evaluate_after:
                self._evaluate(log, self.steps)
        self.store.close()
        return self.folder

    def success_rate(self, step: int) -> float:
        return 0.3 + 0.42 * step / max(self.planned, 1)

    def _evaluate(self, log: MetricsLog, step: int) -> None:
        by_kind: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS}
        by_difficulty: dict[str, list[int]] = {str(level): [0, 0] for level in (1, 2, 3)}
        successes = 0
        for index in range(self.tasks):
            # A task of fixed hardness, so that most outcomes agree over time.
            hardness = (index * 0.6180339) % 1.0
            right = hardness < self.success_rate(step)
            rollout = Rollout(f"e{step}-{index:03d}", f"heldout-{index}", f"e{step}-{index}", split="eval", step=step)
            self._play(rollout, right, calls=1 + index % 2)
            successes += right
            for tally in (by_kind[KINDS[index % 3]], by_difficulty[str(1 + index % 3)]):
                tally[0] += 1
                tally[1] += right
        low, high = wilson_interval(successes, self.tasks)
        ledger = ledger_line(self.store.ledger(split="eval", step=step))
        line = {"version": step, "tasks": self.tasks, "success": successes, "rate": successes / self.tasks, "low": low,
                "high": high, "temperature": 0.0, "by_kind": by_kind, "by_difficulty": by_difficulty, "mean_calls": 2.4,
                "seconds": 14.2, "ledger": ledger}  # fmt: skip
        log.append("eval", step, line)

    def _step(self, log: MetricsLog, step: int) -> None:
        credits: list[RolloutCredit] = []
        rewards: list[float] = []
        for group in range(self.groups):
            right = [self.rng.random() < self.success_rate(step) for _ in range(4)]
            mean = sum(right) / 4
            for member in range(4):
                group_id = f"s{step}-g{group}"
                rollout = Rollout(f"{group_id}-{member}", f"train-{step}-{group}", group_id, step=step)
                graph = self._play(rollout, right[member], calls=1 + member % 2)
                advantage = float(right[member]) - mean
                signs = (max(advantage, 0.0), min(advantage, 0.0))
                nodes = tuple(NodeCredit(node.id, *signs) for node in graph.nodes if node.num_sampled)
                signal = 0 < mean < 1
                masked = None if signal else "no_signal"
                credits.append(RolloutCredit(rollout.id, group_id, nodes if signal else (), 0.01, masked))
                rewards.append(float(right[member]))
        self.store.record_step(step, credits)
        trained = [credit for credit in credits if credit.masked is None]
        ledger = self.store.ledger(split="train", step=step)
        wobble = self.rng.random
        line = {
            "version": step, "reward_mean": sum(rewards) / len(rewards), "reward_std": 0.4,
            "groups_sampled": self.groups, "groups_with_signal": len({credit.group_id for credit in trained}),
            "rollouts": len(rewards), "rollouts_failed": 0, "effective_batch": len(trained),
            "sampled_tokens": ledger.sampled, "trained_tokens": ledger.trained, "unique_tokens": ledger.trained * 3,
            "masked": {"no_signal": len(credits) - len(trained)}, "loss": -0.01 * wobble(), "grad_norm": 1 + wobble(),
            "entropy": 0.9 - 0.02 * step + 0.05 * wobble(), "clip_fraction": 0.01 * wobble(),
            "mismatch_mean_abs": 0.004 + 0.002 * wobble(), "mismatch_max_abs": 0.1 + 0.1 * wobble(), "lr": 2e-5,
            "seconds": {"collect": 18 + wobble(), "train": 9 + wobble(), "publish": 0.4, "total": 31.0},
            "sampled_tokens_per_s": 800 + 80 * wobble(), "trained_tokens_per_s": 1900 + 100 * wobble(),
            "ledger": ledger_line(ledger), "success_by_kind": {},
        }  # fmt: skip
        log.append("step", step, line)

    def _play(self, rollout: Rollout, right: bool, calls: int) -> TrajectoryGraph:
        path = f"logs/app-{crc32(rollout.task_id.encode()) % 90:02d}.log"
        question = self.question.format(path)
        self.store.create_rollout(Rollout(**{**_fields(rollout), "instruction": question}))
        graph = TrajectoryGraph(rollout.id)
        messages = [Message("system", "Answer with the number only."), Message("user", question)]
        parent: int | None = None
        for segment in self.renderer.render(messages, [BASH]):
            tokens = TokenRun.given(segment.token_ids)
            reason = "root" if parent is None else "append"
            parent = graph.add(parent, tokens, role=segment.role, reason=reason, message=segment.message).id
        commands = [f"grep -c ERROR {path}", "ls -la logs"][:calls][::-1]
        for command in commands:
            call = json.dumps({"name": "bash", "arguments": {"command": command if right else command + " data"}})
            parent = self._answer(graph, parent, f"<tool_call>\n{call}\n</tool_call>", rollout.step)
            answer = graph.nodes[parent].message
            assert answer is not None
            result = Message("tool", self.tool_output, tool_call_id=answer.tool_calls[0].id)
            for segment in self.renderer.render_tail([result], after="stop"):
                tokens = TokenRun.given(segment.token_ids)
                parent = graph.add(parent, tokens, role="tool", reason="append", message=result).id
        answer = "17" if right else "There are 3 naïve 😀 files"
        self._answer(graph, parent, answer, rollout.step)
        self.store.commit(rollout.id, graph.nodes)
        self.store.finish_rollout(rollout.id, status=RolloutStatus.FINISHED, reward=float(right), answer=answer)
        return graph

    def _answer(self, graph: TrajectoryGraph, parent: int | None, text: str, version: int) -> int:
        ids = [*self.renderer.encode_answer(text), self.renderer.stop_token_ids[0]]
        logprobs = [log(min(0.999, self.rng.betavariate(3, 0.5) + 1e-3)) for _ in ids]
        tokens = TokenRun.answer(self.renderer.generation_prompt, ids, logprobs, [version] * len(ids), "stop")
        message = self.renderer.parse(ids, "stop").message
        return graph.add(parent, tokens, role="assistant", reason="append", message=message).id


def _fields(rollout: Rollout) -> dict[str, object]:
    return {name: getattr(rollout, name) for name in rollout.__dataclass_fields__}
