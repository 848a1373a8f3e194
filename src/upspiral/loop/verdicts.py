"""Whether what a step or an evaluation collected says anything at all.

Single rollouts fail and are masked. When none of many could be judged, the agent, its sandboxes or the engine are
broken, and going on would only burn steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from upspiral.errors import RunError
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Rollout, RolloutStatus


def check_verdicts(rollouts: Sequence[Rollout], what: str, store: TrajectoryStore) -> None:
    """Raises RunError when there are rollouts and not one has a reward. They are cancelled in the store, so that a
    resumed run tries them again."""
    if not rollouts or any(rollout.reward is not None for rollout in rollouts):
        return
    for rollout in rollouts:
        store.finish_rollout(rollout.id, status=RolloutStatus.CANCELLED, reason=rollout.reason)
    [(reason, count)] = Counter(rollout.reason for rollout in rollouts).most_common(1)
    raise RunError(
        f"{what}: none of the {len(rollouts)} rollouts could be judged, so the run stops here; "
        f"the most frequent reason ({count} times): {reason or 'none was given'}"
    )
