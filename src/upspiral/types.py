"""The nouns of upspiral: frozen, typed, no torch, no I/O (DESIGN section 2).

Arrays are numpy; shape suffixes: ``_T`` is "one entry per token of the node".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "cancelled"]

EdgeKind = Literal["spawn", "join", "compaction", "retry"]

NOT_SAMPLED_VERSION = -1
"""Policy version stored for a token that no policy sampled."""

UNKNOWN_EXPERT = -1
"""Stands in the routes of a token that nobody recorded."""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool offered to the model. `parameters` is a JSON Schema object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool. `arguments` is the text of a JSON object, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message, free of any wire dialect."""

    role: Role
    text: str = ""
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Which call a message of role "tool" answers."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the engine samples. Temperature 0 is greedy; `min_p` 0, `top_k` 0 and `top_p` 1 switch those filters off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are left out (arXiv 2407.01082)."""
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    list_kept: bool = False
    """Whether each sampled token comes with the ids that the filters left to choose from."""


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A run of tokens added to one parent. Immutable once committed.

    A node holds one message: for a message the agent sent, its rendered tokens; for a message the model wrote, the
    generation prompt (not sampled) followed by the sampled tokens.
    """

    id: int
    """0, 1, 2 ... in the order of commitment within the rollout; a parent's id is smaller than its child's."""
    parent: int | None
    role: Role
    reason: str
    """Why the node hangs where it does: "root", "append", or a reason class for a fork such as "sibling", "edited"
    (docs/design/004-any-agent.md lists them)."""
    token_ids: NDArray[np.int32]
    sampled: NDArray[np.bool_]
    """[T] which of the tokens the engine sampled."""
    logprobs: NDArray[np.float32]
    """[T] log-probability under the distribution that was sampled from (natural log); NaN where not sampled."""
    versions: NDArray[np.int32]
    """[T] policy version of each sampled token; NOT_SAMPLED_VERSION elsewhere."""
    routes: NDArray[np.int16] | None = None
    """[T, layers with experts, experts of a token] which experts computed the token *before* each of these, from which
    it was predicted; UNKNOWN_EXPERT where nobody said. None: the model has no experts, or nobody keeps their choice."""
    message: Message | None = None
    finish_reason: FinishReason | None = None
    """Set on nodes with sampled tokens."""
    delivered: bool = True
    """False when the client hung up before it had the answer."""
    auxiliary: str = ""
    """The rule of the run's config that tells the call for a side call (a title, a probe), which is never trained; ""
    for all others."""

    @property
    def num_sampled(self) -> int:
        return int(self.sampled.sum())


@dataclass(frozen=True, slots=True)
class Edge:
    """What caused what between nodes that no path of tokens joins."""

    kind: EdgeKind
    """"spawn": the answer `source` started the tree `target`. "join": the answer `source` came back in the message
    `target`. "compaction": the tree `target` goes on from the summary `source`. "retry": `target` was asked for because
    `source` never arrived."""
    source: int
    target: int
    evidence: Literal["content", "header"] = "content"
    """What told us: the text of the nodes, or only a header that the agent sent."""


class RolloutStatus(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    TRUNCATED = "truncated"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One attempt at one task by one agent. Its tokens live in the trajectory graph of the same id."""

    id: str
    task_id: str
    group_id: str
    split: str = "train"
    """"train"; "eval": it only measures; "demonstration": by an oracle; "served": by an agent elsewhere."""
    step: int = 0
    """The training step that asked for it; for split "eval", the step it measures."""
    status: RolloutStatus = RolloutStatus.RUNNING
    reason: str = ""
    """Why it failed, was truncated or cancelled."""
    reward: float | None = None
    """None: never verified (still running, or infrastructure failed)."""
    answer: str = ""
    """What the agent returned."""
    instruction: str = ""
    """What the task asked, for people who read the run later."""


@dataclass(frozen=True, slots=True)
class NodeCredit:
    """The credit of a node's sampled tokens: the sums of the positive and of the negative advantages of the leaves
    below it. These two numbers are enough for the clipped loss (DESIGN law 2)."""

    node_id: int
    positive: float
    negative: float

    @property
    def total(self) -> float:
        return self.positive + self.negative


@dataclass(frozen=True, slots=True)
class RolloutCredit:
    """What a rollout contributes to the loss of one step: either credited nodes, or a reason why it is masked."""

    rollout_id: str
    group_id: str
    nodes: tuple[NodeCredit, ...] = ()
    """One entry for each node with sampled tokens, unless masked."""
    token_weight: float = 0.0
    """What each of its tokens' losses is multiplied with: the denominators, fixed before packing (DESIGN law 3)."""
    masked: str | None = None
    """For example "no_signal"; its tokens then stay out of the loss and stand in the ledger under this reason."""
    withheld: Mapping[str, int] = field(default_factory=dict)
    """Sampled tokens of nodes that get no credit although the rollout is trained, by reason ("auxiliary")."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """sampled = trained + masked(reason) + dropped(reason), in tokens."""

    sampled: int = 0
    trained: int = 0
    masked: Mapping[str, int] = field(default_factory=dict)
    """Tokens that were looked at and kept out of the loss, by reason (no signal, infrastructure, evaluation)."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Tokens that never reached a batch, by reason (stale, run stopped)."""

    @property
    def difference(self) -> int:
        """Sampled tokens that nothing accounts for. The ledger closes when this is 0."""
        return self.sampled - self.trained - sum(self.masked.values()) - sum(self.dropped.values())

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(
            self.sampled + other.sampled,
            self.trained + other.trained,
            _add_counts(self.masked, other.masked),
            _add_counts(self.dropped, other.dropped),
        )


def _add_counts(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in sorted({*a, *b})}
