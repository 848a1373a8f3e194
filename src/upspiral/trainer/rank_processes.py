"""Ranks that are processes: started on this machine, or by torchrun on many.

With torchrun, the run listens at UPSPIRAL_TRAINER and every node has

    UPSPIRAL_TRAINER=head:29400 UPSPIRAL_TRAINER_KEY=... torchrun --nnodes 2 --nproc-per-node 8 -m upspiral.trainer.rank
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from upspiral.errors import DeadlineError, TrainerError
from upspiral.trainer.rank import ADDRESS

CONNECT_DEADLINE_S = 300.0
"""Python, torch and what the machine else has to do."""
_KILL_DEADLINE_S = 10.0
_GREETING_DEADLINE_S = 10.0
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
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks: list[ProcessRank] = []
    try:
        for number in range(count):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
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
        if (welcome := _welcome(accepted, key)) is not None:
            number, connection = welcome
            found[number] = connection
    return [ProcessRank(found[number], None, None) for number in sorted(found)]


def _welcome(accepted: socket.socket, key: bytes) -> tuple[int, Connection] | None:
    """Its number and the connection to a rank; None for who is none, or says nothing."""
    accepted.settimeout(None)
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(_GREETING_DEADLINE_S))
    connection = Connection(accepted.detach())
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        number = int(connection.recv())
    except (OSError, EOFError, AuthenticationError, ValueError):
        connection.close()
        return None
    with socket.socket(fileno=os.dup(connection.fileno())) as patient:
        patient.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(0.0))
    return number, connection


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
