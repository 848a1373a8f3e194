"""The program of one rank: `python -m upspiral.trainer.rank`, started by `rank_processes.py` or by torchrun, for
`torchrun.py`.

It joins the process group that torchrun's variables name (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), connects to the
trainer at UPSPIRAL_TRAINER and does what it is told. It ends when the trainer does.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from typing import Any

from upspiral.errors import ConfigError, TrainerError
from upspiral.trainer.base import TrainerBackend, TrainerSetup
from upspiral.trainer.ranks import START_DEADLINE_S
from upspiral.trainer.registry import make_backend

ADDRESS, KEY = "UPSPIRAL_TRAINER", "UPSPIRAL_TRAINER_KEY"
"""Environment variables: where the trainer listens (HOST:PORT, or fd:NUMBER of a socket), and what proves that who
connects is a rank of it."""


class RankProgram:
    """What a rank does when it is called, be it over a connection or as an actor."""

    def __init__(self) -> None:
        self._backend: TrainerBackend | None = None

    def call(self, method: str, *args: Any, **keywords: Any) -> Any:
        """A method of the backend; "make" makes it first, "release" closes it so that another can be made, "close" for
        good."""
        if method == "make":
            return self._make(*args)
        assert self._backend is not None, "the first call is make"
        if method in ("release", "close"):
            return self._end(leave=method == "close")
        return getattr(self._backend, method)(*args, **keywords)

    def _make(self, kind: str, setup: TrainerSetup) -> None:
        import torch
        from torch import distributed

        if self._backend is not None:
            raise TrainerError("these ranks have a trainer already; release it first, or start others")
        if setup.device == "auto":
            setup = replace(setup, device="cuda" if torch.cuda.is_available() else "cpu")
        if setup.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                'model.device = "cuda" but a rank of the trainer sees no CUDA device; with Ray, cluster.rank_gpus '
                'gives it one; or use "auto" or "cpu"'
            )
        torch.manual_seed(setup.seed)
        if setup.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        else:
            torch.set_num_threads(_own_threads(setup.threads))
        if not distributed.is_initialized():
            group = "cpu:gloo,cuda:nccl" if setup.device == "cuda" else "gloo"
            distributed.init_process_group(group, timeout=timedelta(seconds=START_DEADLINE_S))
        self._backend = make_backend(kind, setup)

    def _end(self, *, leave: bool) -> None:
        from torch import distributed

        backend, self._backend = self._backend, None
        assert backend is not None
        backend.close()
        if leave:
            distributed.destroy_process_group()


def _own_threads(threads: int) -> int:
    """This rank's share of what the ranks of this machine have together; 0: of its cores."""
    from upspiral.weights.cpu import num_cores

    return max(1, (threads or num_cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def main() -> None:
    connection = _connect(os.environ[ADDRESS])
    threading.Thread(target=_end_with, args=(connection.fileno(),), daemon=True).start()
    program = RankProgram()
    while True:
        try:
            method, args, keywords = connection.recv()
        except EOFError:
            break
        try:
            answer = True, program.call(method, *args, **keywords)
        except BaseException as error:
            traceback.print_exc()
            answer = False, error
        _send(connection, answer)
        if method == "close":
            break
    sys.stdout.flush()
    os._exit(0)  # backends leave threads that wait for ranks which may be gone


def _connect(address: str) -> Any:
    host, _, port = address.rpartition(":")
    if host == "fd":
        return Connection(int(port))
    connection = Client((host, int(port)), authkey=os.environ.pop(KEY).encode())
    connection.send((os.environ["RANK"], os.environ["WORLD_SIZE"]))
    return connection


def _send(connection: Any, answer: tuple[bool, Any]) -> None:
    try:
        connection.send(answer)
    except Exception as error:  # what cannot be pickled
        connection.send((False, RuntimeError(f"{error}; the answer was {answer[1]!r}")))


def _end_with(owner: int) -> None:
    """Ends this process soon after the trainer's end of the connection is closed: it may be waiting in a sum for ranks
    that are gone, and would until the group's deadline."""
    poll = select.poll()
    poll.register(owner, getattr(select, "POLLRDHUP", 0))
    poll.poll()
    time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    main()
