"""Steps of TRL's GRPOTrainer for benchmarks/step_vs_trl.py, run by the interpreter of TRL's own environment: a job on
stdin, figures on stdout."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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

VERSION = "1.16.0"


class Stopwatch:
    """Seconds by phase of the step under way, and the phases of all steps before."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.steps: list[Mapping[str, float]] = []
        self.counts: dict[str, int] = {}
        self._phases: dict[str, float] = {}
        self._began = 0.0

    def begin(self) -> None:
        self._phases, self._began = {}, self._now()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = self._now()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + self._now() - started

    def end(self) -> None:
        whole = self._now() - self._began
        generate, scored, trained = (self._phases[name] for name in ("generate", "scored", "trained"))
        self.steps.append(
            {
                "step_s": whole,
                "generate_s": generate,
                "credit_s": scored - generate,
                "forward_backward_s": trained - scored,
                "update_s": whole - trained,
                **self.counts,
            }
        )


def environment_problem() -> str:
    """Why this interpreter cannot serve; empty when it can."""
    try:
        import trl  # pyright: ignore[reportMissingImports]  (its own environment)
    except ImportError as error:
        return f"it cannot import trl ({error})"
    return "" if trl.__version__ == VERSION else f"it has trl {trl.__version__}, wanted is {VERSION}"


def timed_trainer(watch: Stopwatch) -> type[Any]:
    from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]  (its own environment)

    class TimedTrainer(GRPOTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with watch.phase("trained"):
                return super().training_step(*args, **kwargs)

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            with watch.phase("scored"):
                batch = super()._generate_and_score_completions(*args, **kwargs)
            watch.counts["computed_tokens"] = batch["prompt_ids"].numel() + batch["completion_ids"].numel()
            watch.counts["trained_tokens"] = int(batch.get("tool_mask", batch["completion_mask"]).sum())
            return batch

        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            with watch.phase("generate"):
                return super()._generate(*args, **kwargs)

    return TimedTrainer


class Agents:
    """TRL's `rollout_func`: every rollout calls the model `calls` times and gets a tool result between two calls."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._ids = dict(zip(job.prompt_texts, job.prompts, strict=True))

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        # TRL asks once for each row of a group.
        rows_each = self._job.calls if self._job.row == "call" else 1
        histories = [list(self._ids[text]) for text in prompts[::rows_each]]
        starts = [len(history) for history in histories]
        masks: list[list[int]] = [[] for _ in histories]
        calls: list[list[tuple[list[int], list[int]]]] = [[] for _ in histories]
        for turn in range(self._job.calls):
            if turn:
                for number, (history, mask) in enumerate(zip(histories, masks, strict=True)):
                    result = self._job.result(number, turn)
                    history += result
                    mask += [0] * len(result)
            # As TRL's own loop over tool calls does it: all rows together, with their whole histories.
            answers, _ = trainer._generate_single_turn(histories, None, {}, 1)
            for history, mask, said, own in zip(histories, masks, answers, calls, strict=True):
                own.append((list(history), said))
                history += said
                mask += [1] * len(said)
        sampled = [[token for _, said in own for token in said] for own in calls]
        if self._job.row == "call":
            return {
                "prompt_ids": [sent for own in calls for sent, _ in own],
                "completion_ids": [said for own in calls for _, said in own],
                "logprobs": None,
                "sampled": [tokens for tokens, own in zip(sampled, calls, strict=True) for _ in own],
            }
        return {
            "prompt_ids": [history[:start] for history, start in zip(histories, starts, strict=True)],
            "completion_ids": [history[start:] for history, start in zip(histories, starts, strict=True)],
            "logprobs": None,
            "env_mask": masks,
            "sampled": sampled,
        }


def rewards(completion_ids: Sequence[Sequence[int]], calls: int, sampled: Any = None, **_: Any) -> list[float]:
    tokens = sampled or completion_ids
    wrong = {len(each) for each in tokens} - {calls * NEW_TOKENS}
    assert not wrong, f"rollouts with {wrong} sampled tokens, expected {calls * NEW_TOKENS} each"
    return [reward(each) for each in tokens]


def settings(job: Job, folder: str) -> Any:
    from trl import GRPOConfig  # pyright: ignore[reportMissingImports]  (its own environment)

    rows_each = job.calls if job.row == "call" else 1
    rows = len(job.prompts) * COMPLETIONS * rows_each
    assert rows % job.rows_per_pass == 0, f"{rows} rows do not divide by {job.rows_per_pass}"
    return GRPOConfig(
        output_dir=folder,
        seed=SEED,
        use_cpu=True,
        bf16=False,  # the weights have the dtype of the job; this is autocast
        max_steps=job.warm_ups + job.repeats,
        per_device_train_batch_size=job.rows_per_pass,
        gradient_accumulation_steps=rows // job.rows_per_pass,
        num_generations=COMPLETIONS * rows_each,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        temperature=TEMPERATURE,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="none",
        epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def run(job: Job) -> list[Mapping[str, float]]:
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]  (its own environment)
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    watch = Stopwatch(job.now)
    tokenizer = AutoTokenizer.from_pretrained(job.model_folder, padding_side="left")
    assert tokenizer(list(job.prompt_texts))["input_ids"] == [list(ids) for ids in job.prompts], "other prompts"

    class Timer(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.end()
            if len(watch.steps) > job.warm_ups and sum(step["step_s"] for step in watch.steps) > job.budget_s:
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        trainer = timed_trainer(watch)(
            model=AutoModelForCausalLM.from_pretrained(job.model_folder, dtype=getattr(torch, job.dtype)),
            reward_funcs=lambda completion_ids, **given: rewards(completion_ids, job.calls, **given),
            args=settings(job, folder),
            train_dataset=Dataset.from_dict({"prompt": list(job.prompt_texts)}),
            processing_class=tokenizer,
            callbacks=[Timer()],
            rollout_func=None if job.row == "completion" else Agents(job),
        )
        trainer.train()
    return watch.steps


def main() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
    problem = environment_problem()
    if problem or "--check" in sys.argv:
        sys.exit(problem or 0)
    with contextlib.redirect_stdout(sys.stderr):
        job = Job.read()
        steps = run(job)
    answer(job, steps)


if __name__ == "__main__":
    main()
