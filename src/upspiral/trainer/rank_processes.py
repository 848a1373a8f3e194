"""Ranks that are processes of this machine; `torchrun.py` has those that torchrun starts, on many."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from upspiral.errors import TrainerError
from upspiral.trainer.rank import ADDRESS

_KILL_DEADLINE_S = 10.0
_LOG_TAIL = 2000


class ProcessRank:
    """See `Rank`. `process` is None for one that torchrun started."""

    def __init__(self, connection: Connection, process: subprocess.Popen[bytes] | None, log: Path | None) -> None:
        self._connection, self._process, self._log = connection, process, log
        self._calls: SimpleQueue[tuple[Future[Any], tuple[Any, ...]] | None] = SimpleQueue()
        """None is the last."""
        self._killed = False
        self._asking = threading.Lock()
        # A daemon, so that a rank that hangs keeps nobody from ending. It sends as well: a large call to a process that
        # was stopped would not return.
        threading.Thread(target=self._exchange, name="trainer-rank", daemon=True).start()

    def call(self, method: str, *args: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._asking:
            if not self._killed:
                self._calls.put((future, (method, args, keywords)))
                return future
        future.set_exception(self._death())
        return future

    def kill(self) -> None:
        with self._asking:
            self._killed = True
            self._calls.put(None)
        with suppress(OSError):  # ends a wait for an answer, which a close alone does not
            socket.socket(fileno=os.dup(self._connection.fileno())).shutdown(socket.SHUT_RDWR)
        if self._process is not None:
            self._process.kill()
            self._process.wait(_KILL_DEADLINE_S)

    def _exchange(self) -> None:
        """Calls and their answers, one after the other, until the rank is killed."""
        for future, call in iter(self._calls.get, None):
            try:
                self._connection.send(call)
                succeeded, result = self._connection.recv()
            except (OSError, EOFError):
                future.set_exception(self._death())
            except Exception as error:  # what cannot be pickled, here or there
                future.set_exception(TrainerError(f"{call[0]!r} of the trainer cannot be sent to its ranks: {error!r}"))
            else:
                future.set_result(result) if succeeded else future.set_exception(result)

    def _death(self) -> TrainerError:
        if self._process is None:
            return TrainerError("a rank of the trainer is gone; see torchrun's output for why")
        try:
            status = f"exit code {self._process.wait(_KILL_DEADLINE_S)}"
        except subprocess.TimeoutExpired:
            status = "it closed its connection"
        tail = self._log.read_bytes()[-_LOG_TAIL:].decode(errors="replace") if self._log else ""
        return TrainerError(f"a rank of the trainer is gone ({status}); the end of {self._log}:\n{tail}")


def start_ranks(count: int, logs: Path, *, variables: Mapping[str, str] | None = None) -> list[ProcessRank]:
    """Starts the ranks of a trainer on this machine; what they print is in `logs`. One that ends at once fails the
    first call."""
    logs.mkdir(parents=True, exist_ok=True)
    group = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    ranks: list[ProcessRank] = []
    try:
        for number in range(count):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            # One thread until the rank has its share; see `RankProgram`.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {}), **group, **own}
            ranks.append(_start_rank(environment, logs / f"rank-{number}.log"))
    except BaseException:
        for rank in ranks:
            rank.kill()
        raise
    return ranks


def _start_rank(environment: dict[str, str], log: Path) -> ProcessRank:
    ours, theirs = socket.socketpair()
    with theirs, log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "upspiral.trainer.rank"],
            env={**environment, ADDRESS: f"fd:{theirs.fileno()}"}, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    return ProcessRank(Connection(ours.detach()), process, log)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
