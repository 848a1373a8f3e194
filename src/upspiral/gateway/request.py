"""What an agent asks for, free of any wire dialect."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from upspiral.config.models import AuxiliaryRule, GatewayConfig
from upspiral.types import Message, SamplingParams, ToolSpec


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call tools."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    """"none": tools stay in the prompt, but nothing the model writes is taken for a call. "required": the answer begins
    with a call. "named": it begins with a call of `name`."""
    name: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """One request for one or more answers. None means that the agent did not say."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    """False: the answer ends after its first tool call."""
    answers: int = 1
    stop_strings: tuple[str, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """Sample from the k most likely tokens; 0: from all."""
    min_p: float | None = None
    seed: int | None = None
    model: str = ""
    """The name that the agent gave. Every name is answered by the same model; rules may tell side calls by it."""


@dataclass(frozen=True, slots=True)
class SessionPolicy:
    """What a rollout's owner imposes on all of its requests. None leaves the choice to the agent."""

    temperature: float | None = None
    top_p: float | None = None
    max_completion_tokens: int | None = None
    """The most tokens of one answer; a smaller limit that the agent sends wins."""
    max_calls: int | None = None
    """Requests after which the rollout is truncated."""
    seed: int | None = None
    """Each answer gets a seed of its own, made from this one; a seed that the agent sends is then ignored, because it
    would make the rollouts of a group alike."""
    gateway: GatewayConfig = field(default_factory=GatewayConfig)

    def auxiliary(self, request: AnswerRequest) -> str:
        """The name of the first rule that tells the request for a side call; "" when none does."""
        return next((rule.name for rule in self.gateway.auxiliary if _tells(rule, request)), "")

    def sampling(
        self, request: AnswerRequest, *, room: int, stop_token_ids: tuple[int, ...], call: int, answer: int
    ) -> SamplingParams:
        """Parameters of one answer of a call, both counted, with `room` tokens of context left."""
        limits = [room, request.max_tokens, self.max_completion_tokens]
        return SamplingParams(
            max_tokens=min(limit for limit in limits if limit is not None),
            temperature=_first(self.temperature, request.temperature, 1.0),
            top_p=_first(self.top_p, request.top_p, 1.0),
            # An owner who fixes how the policy is filtered means the whole filter.
            top_k=max(0, request.top_k or 0) if self.top_p is None else 0,
            min_p=request.min_p or 0.0 if self.top_p is None else 0.0,
            stop_token_ids=stop_token_ids,
            seed=self._seed(request, call, answer),
        )

    def _seed(self, request: AnswerRequest, call: int, answer: int) -> int | None:
        if self.seed is not None:
            return (self.seed * 1_000_003 + call * 1009 + answer) % 2**63
        return None if request.seed is None else (request.seed + answer) % 2**63


def _tells(rule: AuxiliaryRule, request: AnswerRequest) -> bool:
    system = "\n".join(message.text for message in request.messages if message.role == "system")
    conditions = (
        rule.model is None or fnmatchcase(request.model, rule.model),
        rule.system is None or rule.system in system,
        rule.max_tokens is None or (request.max_tokens is not None and request.max_tokens <= rule.max_tokens),
        rule.tools is None or rule.tools == bool(request.tools),
    )
    return all(conditions)


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
