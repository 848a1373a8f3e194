"""Ranks of the trainer as actors."""

from __future__ import annotations

import asyncio
import os
import socket
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from upspiral.errors import TrainerError
from upspiral.launch.ray.mark import Mark
from upspiral.trainer.rank import RankProgram
from upspiral.weights.shared_folder import shared_folder

FOLDER_DEADLINE_S = 120.0


class RankHost:
    """The actor of one rank. Its calls are done one after the other, in their order."""

    def __init__(self) -> None:
        self._program = RankProgram()
        self._stack = ExitStack()

    def meeting_point(self) -> tuple[str, int]:
        """Where ranks find each other, if this one is the first."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, variables: Mapping[str, str], mark: Mark) -> None:
        """torchrun's variables, for the process group, and what devices there are for this rank, if it is told: torch
        looks when it first computes on one. `mark`: see `Mark.check`."""
        mark.check()
        os.environ.update(variables)

    def weights_root(self) -> tuple[str, Path]:
        """A folder in shared memory that goes when this rank does, and the id of the node that has it."""
        import ray

        return ray.get_runtime_context().get_node_id(), self._stack.enter_context(shared_folder())

    def call(self, method: str, *args: Any, **keywords: Any) -> Any:
        # Arrays of the object store are for reading only, and nobody writes into a batch.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return self._program.call(method, *args, **keywords)


class RayRank:
    """See `Rank`."""

    def __init__(self, actor: Any) -> None:
        """`actor`: a `RankHost`."""
        self._actor = actor

    def call(self, method: str, *args: Any, **keywords: Any) -> Future[Any]:
        answered: Future[Any] = Future()

        def settle(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                answered.set_result(done.result())
            else:
                answered.set_exception(_cause(error))

        self._actor.call.remote(method, *args, **keywords).future().add_done_callback(settle)
        return answered

    async def weights_root(self, *, deadline_s: float = FOLDER_DEADLINE_S) -> tuple[str, Path]:
        """See `RankHost`. Raises TrainerError when the rank is gone or does not answer."""
        from ray.exceptions import RayError

        try:
            return await asyncio.wait_for(self._actor.weights_root.remote(), deadline_s)
        except TimeoutError:
            raise TrainerError(f"the first rank made no folder within {deadline_s:.0f} s") from None
        except RayError as error:
            raise _cause(error) from error

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


def _cause(error: BaseException) -> BaseException:
    """What the rank raised, without Ray's wrapping."""
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    if isinstance(error, RayError):
        return TrainerError(f"a rank of the trainer, or what it was sent, is gone: {error}")
    return error
