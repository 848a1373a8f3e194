"""`upspiral view`: a run, or one rollout of it, in the terminal."""

from __future__ import annotations

from pathlib import Path


def view(run: Path, rollout: str | None = None, /) -> None:
    """Show the rollouts of a run, or one as a conversation with token log-probabilities and advantages.

    Parameters
    ----------
    run
        The run folder, such as runs/demo.
    rollout
        The id of a rollout, or its beginning; without it, all are listed.
    """
    from upspiral.dashboard import view as dashboard

    dashboard.view(run, rollout)
