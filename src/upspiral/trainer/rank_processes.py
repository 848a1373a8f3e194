"""Ranks that are processes: started on this machine, or by torchrun on many.

With torchrun, the run listens at UPSPIRAL_TRAINER and every node has

    UPSPIRAL_TRAINER=head:29400 UPSPIRAL_TRAINER_KEY=... torchrun --nnodes 2 --nproc-per-node 8 -m upspiral.trainer.rank
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from upspiral.errors import DeadlineError, TrainerError
from upspiral.trainer.rank import ADDRESS

CONNECT_DEADLINE_S = 300.0
"""Python, torch and what the machine else has to do."""
_KILL_DEADLINE_S = 10.0
_LOG_TAIL = 2000


class ProcessRank:
    """See `Rank`. `process` is None for one that torchrun started."""

    def __init__(self, connection: Connection, process: subprocess.Popen[bytes] | None, log: Path | None) -> None:
        self._connection, self._process, self._log = connection, process, log
        self._lock = threading.Lock()
        self._waiting: deque[Future[Any]] = deque()
        self._gone = False
        threading.Thread(target=self._read, name="trainer-rank", daemon=True).start()

    def call(self, method: str, *args: Any, **keywords: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._gone:
                future.set_exception(self._death())
                return future
            self._waiting.append(future)
            with suppress(OSError):  # the reader sees the end as well, and fails all that wait
                self._connection.send((method, args, keywords))
        return future

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(_KILL_DEADLINE_S)
        with self._lock:
            if not self._gone:
                with suppress(OSError):  # wakes the reader, which a close alone does not
                    socket.socket(fileno=os.dup(self._connection.fileno())).shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        try:
            while True:
                succeeded, result = self._connection.recv()
                future = self._waiting.popleft()
                if succeeded:
                    future.set_result(result)
                else:
                    future.set_exception(result)
        except (OSError, EOFError):
            pass
        with self._lock:
            self._gone = True
            self._connection.close()
        while self._waiting:
            self._waiting.popleft().set_exception(self._death())

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
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = []
    for number in range(count):
        ours, theirs = socket.socketpair()
        own = {"RANK": str(number), "LOCAL_RANK": str(number), ADDRESS: f"fd:{theirs.fileno()}"}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {}), **group, **own}
        log = logs / f"rank-{number}.log"
        with theirs, log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "upspiral.trainer.rank"],
                env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        ranks.append(ProcessRank(Connection(ours.detach()), process, log))
    return ranks


def accept_ranks(server: socket.socket, count: int, key: bytes) -> list[ProcessRank]:
    """Ranks that torchrun starts, in the order of their numbers. `server` listens at what their UPSPIRAL_TRAINER says,
    `key` is their UPSPIRAL_TRAINER_KEY. Others who connect are turned away."""
    deadline = time.monotonic() + CONNECT_DEADLINE_S
    found: dict[int, Connection] = {}
    while len(found) < count:
        server.settimeout(max(0.1, deadline - time.monotonic()))
        try:
            accepted, _ = server.accept()
        except TimeoutError:
            missing = sorted({*range(count)} - {*found})
            raise DeadlineError(f"ranks {missing} did not connect within {CONNECT_DEADLINE_S:.0f} s") from None
        accepted.settimeout(None)
        connection = Connection(accepted.detach())
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            found[connection.recv()] = connection
        except (OSError, EOFError, AuthenticationError):
            connection.close()
    return [ProcessRank(found[number], None, None) for number in sorted(found)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
