"""What the lines of metrics.jsonl hold. Readers take every field as optional, so that old runs stay readable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from upspiral.types import Ledger

Tally = tuple[int, int]
"""(tried, succeeded)."""


class LedgerLine(TypedDict):
    """A `Ledger` as written. `difference` is 0 when it closes."""

    sampled: int
    trained: int
    masked: Mapping[str, int]
    dropped: Mapping[str, int]
    difference: int


class StepLine(TypedDict, total=False):
    """One RL step. `step` counts from 1; `version` is that of the weights the step made."""

    kind: str
    step: int
    time: float
    version: int
    reward_mean: float
    reward_std: float
    groups_sampled: int
    groups_with_signal: int
    rollouts: int
    rollouts_failed: int
    effective_batch: int
    """Rollouts that were trained on."""
    sampled_tokens: int
    trained_tokens: int
    masked: Mapping[str, int]
    """Masked rollouts by reason."""
    reasons: Mapping[str, int]
    """Nodes by the reason why they hang where they do (docs/design/004-any-agent.md)."""
    edges: Mapping[str, int]
    """Causal edges by kind."""
    loss: float
    grad_norm: float
    entropy: float
    """Mean over trained tokens, in nats."""
    clip_fraction: float
    mismatch_mean_abs: float
    """Mean of |log p_old - log q| over trained tokens: trainer against engine."""
    mismatch_max_abs: float
    lr: float
    seconds: Mapping[str, float]
    """collect, train, publish, checkpoint, total."""
    sampled_tokens_per_s: float
    trained_tokens_per_s: float
    unique_tokens: int
    """Tokens computed in the forward pass; every shared prefix counts once."""
    ledger: LedgerLine
    success_by_kind: Mapping[str, Tally]


class EvalLine(TypedDict, total=False):
    """One held-out evaluation. `step` is how many RL steps came before it: 0 is the warm start."""

    kind: str
    step: int
    time: float
    version: int
    tasks: int
    success: int
    rate: float
    low: float
    high: float
    """95 % Wilson interval of `rate`."""
    temperature: float
    by_kind: Mapping[str, Tally]
    by_difficulty: Mapping[str, Tally]
    mean_calls: float
    """Model calls per rollout."""
    seconds: float
    ledger: LedgerLine
    """Its tokens, all masked as "evaluation"."""


def ledger_line(ledger: Ledger) -> LedgerLine:
    """The ledger as a metrics field."""
    return {
        "sampled": ledger.sampled,
        "trained": ledger.trained,
        "masked": dict(ledger.masked),
        "dropped": dict(ledger.dropped),
        "difference": ledger.difference,
    }


def ledger_from_line(line: Mapping[str, Any]) -> Ledger:
    """The "ledger" field of a metrics line; an empty ledger when it has none."""
    field = line.get("ledger") or {}
    return Ledger(
        sampled=field.get("sampled", 0),
        trained=field.get("trained", 0),
        masked=field.get("masked") or {},
        dropped=field.get("dropped") or {},
    )
