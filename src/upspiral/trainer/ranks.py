"""A trainer backend whose work is done by several processes: each call goes to all of them, in the same order.

Who started them is hidden behind `Rank`: `rank_processes.py` starts them here or waits for torchrun's, `launch/` has
Ray's actors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any, Protocol

from upspiral.errors import TrainerError, UpspiralError
from upspiral.trainer.base import StepKind, StepMetrics, TrainerSetup
from upspiral.trainer.forest import ForestBatch
from upspiral.weights.publication import Publication, PublisherSettings

CALL_DEADLINE_S = 3600.0
"""A step of a large model on a slow machine included."""
START_DEADLINE_S = 900.0
"""Imports, the process group and the model's weights."""
CLOSE_DEADLINE_S = 30.0
_log = logging.getLogger(__name__)
_CAUSE_DEADLINE_S = 2.0
"""A rank that dies makes others fail, too, some of them before its own end is noticed."""


class Rank(Protocol):
    """One process of the trainer."""

    def call(self, method: str, *args: Any, **keywords: Any) -> Future[Any]:
        """Calls a method of the rank's backend; "make" makes it first, "release" closes it and leaves room for another.
        Calls are done one after the other. The future raises what the method raised, or TrainerError when the process
        is gone."""
        ...

    def kill(self) -> None:
        """Ends the process, whatever it does, and waits for that. Killing it twice does nothing."""
        ...


class Ranks:
    """See `TrainerBackend`. A rank that fails leaves the others waiting for it in the middle of a sum, so all of them
    are killed and every further call raises TrainerError: make a new one, and `load` a checkpoint."""

    def __init__(
        self,
        ranks: Sequence[Rank],
        kind: str,
        setup: TrainerSetup,
        *,
        share: Callable[[Any], Any] = lambda argument: argument,
        call_deadline_s: float = CALL_DEADLINE_S,
    ) -> None:
        """`ranks` are this trainer's alone until it releases them. `kind`: see `make_backend`. `share`: what stands for
        a large argument in the calls of all ranks, where there is memory that they share. Raises what a rank raises
        when it makes its backend, and TrainerError when it has one of another trainer."""
        self._ranks = list(ranks)
        self._share = share
        self._call_deadline_s = call_deadline_s
        self._failed: Exception | None = None
        self._all("make", kind, setup, deadline_s=START_DEADLINE_S)

    def step(
        self, batches: Sequence[ForestBatch], *, kind: StepKind = "policy", lr: float | None = None
    ) -> StepMetrics:
        return self._all("step", self._share(list(batches)), kind=kind, lr=lr)

    def publish(self, settings: PublisherSettings, version: int) -> Publication:
        return self._all("publish", settings, version)

    def rest(self) -> None:
        self._all("rest")

    def save(self, folder: Path) -> None:
        self._all("save", folder)

    def load(self, folder: Path) -> None:
        self._all("load", folder)

    def forget_moments(self) -> None:
        self._all("forget_moments")

    def release(self) -> list[Rank]:
        """Gives the processes back, for another trainer; this one is not used afterwards."""
        self._all("release", deadline_s=CLOSE_DEADLINE_S)
        self._failed = TrainerError("the trainer released them")
        ranks, self._ranks = self._ranks, []
        return ranks

    def close(self) -> None:
        try:
            if self._failed is None:
                self._all("close", deadline_s=CLOSE_DEADLINE_S)
        except Exception as error:  # whatever a rank raised: it is killed all the same
            _log.warning("the ranks of the trainer did not close: %s", error)
        finally:
            self._failed = self._failed or TrainerError("the trainer was closed")
            for rank in self._ranks:
                rank.kill()

    def _all(self, method: str, *args: Any, deadline_s: float | None = None, **keywords: Any) -> Any:
        """What the first rank returns, when all have returned."""
        if self._failed is not None:
            raise TrainerError(f"the trainer's ranks are gone ({self._failed}); start them again") from self._failed
        deadline_s = deadline_s or self._call_deadline_s
        futures = [rank.call(method, *args, **keywords) for rank in self._ranks]
        done, waiting = wait(futures, timeout=deadline_s, return_when=FIRST_EXCEPTION)
        if any(future.exception() is not None for future in done):
            raise self._give_up(_cause(futures))
        if waiting:
            late = [number for number, future in enumerate(futures) if future in waiting]
            raise self._give_up(TrainerError(f"ranks {late} did not end {method!r} within {deadline_s:.0f} s"))
        return futures[0].result()

    def _give_up(self, error: BaseException) -> BaseException:
        self._failed = error if isinstance(error, Exception) else TrainerError(repr(error))
        for rank in self._ranks:
            rank.kill()
        return error


def _cause(futures: Sequence[Future[Any]]) -> BaseException:
    """What went wrong first, of what has gone wrong by now or soon: our own errors, before torch's about a rank that is
    gone. Torch's alone is a TrainerError: a rank may be gone of which nobody has told yet."""
    done, _ = wait(futures, timeout=_CAUSE_DEADLINE_S)
    errors = [error for future in futures if future in done and (error := future.exception()) is not None]
    found = next((error for error in errors if isinstance(error, UpspiralError)), errors[0])
    if isinstance(found, RuntimeError | OSError) and not isinstance(found, UpspiralError):
        failed = TrainerError(f"a rank of the trainer failed: {type(found).__name__}: {found}")
        failed.__cause__ = found
        return failed
    return found
