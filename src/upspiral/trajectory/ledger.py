"""The ledger: sampled = trained + masked(reason) + dropped(reason), in tokens (DESIGN law 5)."""

from __future__ import annotations

from collections.abc import Mapping

from upspiral.errors import LedgerError
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import Ledger, Rollout, RolloutCredit, RolloutStatus

EVALUATION = "evaluation"
"""Why the tokens of rollouts that only measure stay out of the loss."""
MASKED_SPLITS = {"eval": EVALUATION, "demonstration": "demonstration", "served": "not_trained"}
"""Splits that RL never trains on, and under which reason their tokens stand in the ledger. Those of demonstrations were
not sampled by a policy, the warm start learns them; served rollouts have no trainer."""


def ledger_of(
    graph: TrajectoryGraph, credit: RolloutCredit | None, *, default_mask_reason: str | None = None
) -> Ledger:
    """The ledger of one rollout. Its tokens are masked under `default_mask_reason` when there is no credit; without
    either they stay unaccounted for, and `check_closed` will say so."""
    if credit is None:
        return account(graph.num_sampled, 0, default_mask_reason)
    credited = {node.node_id for node in credit.nodes}
    trained = sum(node.num_sampled for node in graph.nodes if node.id in credited)
    return account(graph.num_sampled, trained, credit.masked, credit.withheld)


def account(sampled: int, trained: int, mask_reason: str | None, withheld: Mapping[str, int] | None = None) -> Ledger:
    """The ledger of a rollout of which `trained` of `sampled` tokens are in the loss and `withheld` are kept out by
    reason, or all are masked."""
    if mask_reason is not None:
        return Ledger(sampled, 0, {mask_reason: sampled})
    return Ledger(sampled, trained, dict(withheld or {}))


def account_uncredited(rollout: Rollout, sampled: int) -> Ledger:
    """The ledger of a rollout that no step has credited. A rollout in flight or cancelled is dropped; one that ended
    and was neither trained nor masked stays unaccounted for."""
    if rollout.status is RolloutStatus.RUNNING:
        return Ledger(sampled, dropped={"running": sampled})
    if rollout.split != "train":
        return account(sampled, 0, MASKED_SPLITS.get(rollout.split, EVALUATION))
    if rollout.status is RolloutStatus.CANCELLED:
        return Ledger(sampled, dropped={rollout.reason or "cancelled": sampled})
    return Ledger(sampled)


def check_closed(ledger: Ledger, where: str) -> None:
    """Raises LedgerError when tokens are unaccounted for. `where` names the step or rollout for the message."""
    if ledger.difference == 0:
        return
    kind = "unaccounted for" if ledger.difference > 0 else "counted twice"
    raise LedgerError(
        f"ledger of {where} does not close: {abs(ledger.difference)} tokens {kind} (sampled {ledger.sampled}, "
        f"trained {ledger.trained}, masked {dict(ledger.masked)}, dropped {dict(ledger.dropped)}). "
        "This is a bug in credit or packing, not in your run file; please report it with trajectories.db"
    )
