"""What a step of a run asks for, in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from upspiral.config.models import RunConfig


@dataclass(frozen=True, slots=True)
class StepLoad:
    """The rollouts of one step, all alike."""

    groups: int
    group_size: int
    turns: int
    """Answers of the model in a rollout."""
    prompt_tokens: int
    """Before the first answer; the rollouts of a group share them."""
    answer_tokens: int
    """Of one answer."""
    result_tokens: int
    """Between two answers."""

    @classmethod
    def of(
        cls, config: RunConfig, *, turns: int | None = None, prompt: int | None = None, answer: int | None = None
    ) -> StepLoad:
        """As the run file's limits allow at most: rollouts that fill their context. Who knows better says so."""
        context, agent = config.engine.context_length, config.agent
        turns = turns or agent.max_calls
        answer = min(answer or agent.max_completion_tokens, max(1, context // (2 * turns)))
        prompt = min(prompt or context // 4, context - turns * answer)
        results = max(0, context - prompt - turns * answer) // max(1, turns - 1) if turns > 1 else 0
        return cls(config.algorithm.groups_per_step, config.algorithm.group_size, turns, prompt, answer, results)

    @property
    def rollouts(self) -> int:
        return self.groups * self.group_size

    @property
    def length(self) -> int:
        """Tokens of a rollout at its end."""
        return self.prompt_tokens + self.turns * self.answer_tokens + (self.turns - 1) * self.result_tokens

    @property
    def sampled(self) -> int:
        return self.rollouts * self.turns * self.answer_tokens

    @property
    def prefilled(self) -> int:
        """With a prefix cache."""
        return self.groups * self.prompt_tokens + self.rollouts * (self.turns - 1) * self.result_tokens

    @property
    def unique(self) -> int:
        """Tokens that the trainer computes: a group's prompt once."""
        return self.groups * self.prompt_tokens + self.rollouts * (self.length - self.prompt_tokens)

    @property
    def decoded_context(self) -> float:
        """How many tokens a sampled one sees, on average."""
        between = self.answer_tokens + self.result_tokens
        return self.prompt_tokens + (self.turns - 1) / 2 * between + self.answer_tokens / 2

    @property
    def prefilled_context(self) -> float:
        prompts, results = self.groups * self.prompt_tokens, self.rollouts * (self.turns - 1) * self.result_tokens
        between = self.answer_tokens + self.result_tokens
        before = self.prompt_tokens + self.turns / 2 * between - self.result_tokens / 2
        return (prompts * self.prompt_tokens / 2 + results * before) / (prompts + results)

    @property
    def trained_context(self) -> float:
        prompts = self.groups * self.prompt_tokens
        behind = (self.prompt_tokens + self.length) / 2
        return (prompts * self.prompt_tokens / 2 + (self.unique - prompts) * behind) / self.unique

    @property
    def flat(self) -> int:
        """Tokens of one row for each rollout, which others compute."""
        return self.rollouts * self.length
