"""Ranks of the trainer as actors."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from upspiral.errors import TrainerError
from upspiral.trainer.rank import RankProgram


class RankHost:
    """The actor of one rank. Its calls are done one after the other, in their order."""

    def __init__(self) -> None:
        self._program = RankProgram()

    def meeting_point(self) -> tuple[str, int]:
        """Where ranks find each other, if this one is the first."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(self, variables: Mapping[str, str]) -> None:
        """torchrun's variables, for the process group."""
        os.environ.update(variables)

    def call(self, method: str, *args: Any, **keywords: Any) -> Any:
        return self._program.call(method, *args, **keywords)


class RayRank:
    """See `Rank`."""

    def __init__(self, actor: Any) -> None:
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

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


def _cause(error: BaseException) -> BaseException:
    """What the rank raised, without Ray's wrapping."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    if isinstance(error, RayActorError):
        return TrainerError(f"a rank of the trainer is gone: {error}")
    return error
