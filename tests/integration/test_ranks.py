"""Ranks: one that raises, dies or hangs ends all of them with its reason; none outlives its owner."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Client, Connection
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.troubled_backend import CANNOT_BE_SENT, DIES, FINE, HANGS, RAISES
from upspiral.config.models import AlgorithmConfig, TrainerConfig
from upspiral.errors import ConfigError, DeadlineError, ModelError, TrainerError
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.rank_processes import ProcessRank, start_ranks
from upspiral.trainer.ranks import Ranks
from upspiral.trainer.torchrun import accept_ranks, torchrun_ranks
from upspiral.weights.cpu import num_cores

ROOT = Path(__file__).parents[2]
PATH = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
KIND = "tests.fixtures.troubled_backend:TroubledBackend"
SETUP = TrainerSetup(Path("none"), "float32", "cpu", TrainerConfig(), AlgorithmConfig(), temperature=1.0)

OWNER = f"""
import sys
from pathlib import Path
from tests.integration.test_ranks import KIND, SETUP, PATH
from upspiral.trainer.rank_processes import start_ranks
from upspiral.trainer.ranks import Ranks
ranks = Ranks(start_ranks(2, Path(sys.argv[1]), variables=PATH), KIND, SETUP)
print("made", flush=True)
ranks.step([], lr={HANGS})
"""


def children(of: int) -> set[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(of)], capture_output=True, text=True, timeout=20)
    return {int(line) for line in found.stdout.split()}


def eventually(true: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, f"waited {deadline_s} s for {what}"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("trouble", "error", "says"),
    [
        (RAISES, ModelError, "the last rank has no model"),
        (DIES, TrainerError, r"exit code 3\)[\s\S]*the last words"),
        (HANGS, TrainerError, r"ranks \[0, 1\] did not end 'step' within 3 s"),
        (CANNOT_BE_SENT, TrainerError, "RuntimeError: .*pickle"),
    ],
)
def test_trouble_of_one_rank_ends_all(tmp_path: Path, trouble: float, error: type[Exception], says: str) -> None:
    before = children(os.getpid())
    ranks = Ranks(start_ranks(2, tmp_path, variables=PATH), KIND, SETUP, call_deadline_s=3)
    started = children(os.getpid()) - before
    try:
        assert ranks.step([], lr=FINE).loss == 3.0
        with pytest.raises(error, match=says):
            ranks.step([], lr=trouble)
        assert len(started) >= 2 and not any(is_alive(pid) for pid in started)
        with pytest.raises(TrainerError, match="start them again"):
            ranks.step([], lr=FINE)
    finally:
        ranks.close()


@pytest.mark.parametrize(("threads", "own"), [(6, 3), (1, 1), (0, max(1, num_cores() // 2))])
def test_ranks_of_a_machine_share_its_threads(tmp_path: Path, threads: int, own: int) -> None:
    ranks = Ranks(start_ranks(2, tmp_path, variables=PATH), KIND, replace(SETUP, threads=threads))
    try:
        assert ranks.step([], lr=FINE).tokens["threads"] == own
    finally:
        ranks.close()


def test_a_kind_whose_packages_are_missing_names_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_package"):
        Ranks(start_ranks(1, tmp_path, variables=PATH), "no_such_package:Backend", SETUP)


def test_ranks_have_one_trainer_at_a_time(tmp_path: Path) -> None:
    ranks = start_ranks(2, tmp_path, variables=PATH)
    first = Ranks(ranks, KIND, SETUP)
    second = Ranks(first.release(), KIND, SETUP)
    try:
        with pytest.raises(TrainerError, match="released"):
            first.step([], lr=FINE)
        first.close()
        assert second.step([], lr=FINE).loss == 3.0
        with pytest.raises(TrainerError, match="have a trainer already"):
            Ranks(ranks, KIND, SETUP)
    finally:
        second.close()


def test_what_served_a_rank_ends_when_it_is_killed_and_later_calls_fail() -> None:
    ours, theirs = socket.socketpair()
    before = {*threading.enumerate()}
    rank = ProcessRank(Connection(ours.detach()), None, None)
    (thread,) = {*threading.enumerate()} - before
    with theirs:
        waiting = [rank.call("step"), rank.call("step")]  # one is sent, and nobody answers
        rank.kill()
        rank.kill()
        for future in (*waiting, rank.call("step")):
            with pytest.raises(TrainerError, match="is gone"):
                future.result(10)
        thread.join(10)
        assert not thread.is_alive()


def test_no_rank_outlives_its_owner(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    owner = subprocess.Popen(command, env={**os.environ, **PATH}, stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"made\n"
        ranks = children(owner.pid)
        assert len(ranks) == 2 and all(is_alive(pid) for pid in ranks)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate(timeout=20)
    eventually(lambda: not any(is_alive(pid) for pid in ranks), "the ranks of a killed owner to end")


def test_ranks_of_torchrun_connect_and_others_are_turned_away(tmp_path: Path) -> None:
    key = secrets.token_hex(16)
    with socket.create_server(("127.0.0.1", 0)) as server:
        stranger = socket.create_connection(server.getsockname())
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
        with torchrun(server.getsockname()[1], key, tmp_path) as process:
            ranks = Ranks(asyncio.run(accept_ranks(server, 2, key)), KIND, SETUP)
            assert ranks.step([], lr=FINE).loss == 3.0
            assert ranks.step([], lr=FINE).trained_tokens in {
                pid for child in children(process.pid) for pid in (child, *children(child))
            }
            ranks.close()
            assert process.wait(30) == 0
        stranger.close()


def test_torchrun_that_starts_another_number_of_ranks_is_refused_and_they_end(tmp_path: Path) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    with server, torchrun(server.getsockname()[1], "key", tmp_path) as process:
        with pytest.raises(ConfigError, match=r"trainer.parallel.ranks = 3, but torchrun started 2"):
            asyncio.run(accept_ranks(server, 3, "key"))
        server.close()
        assert process.wait(60) != 0


def test_ranks_that_do_not_come_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(rank_two_of_three, server.getsockname())
        says = r"1 of the trainer's 3 ranks connected within 3 s, and not \[0, 2\]; start torchrun"
        with pytest.raises(DeadlineError, match=says):
            asyncio.run(accept_ranks(server, 3, "key", deadline_s=3.0))


@pytest.mark.parametrize("address", ["192.0.2.1:29400", "127.0.0.1:99999"])
def test_where_a_run_cannot_listen_is_named(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f'trainer.parallel.listen = "{address}": this machine cannot listen there'):
        asyncio.run(torchrun_ranks(address, 1, tmp_path, print))


def rank_two_of_three(address: tuple[str, int]) -> None:
    with Client(address, authkey=b"key") as connection:
        connection.send(("1", "3"))
        with suppress(EOFError):
            connection.recv()


@contextmanager
def torchrun(port: int, key: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Two ranks, for a trainer at that port."""
    variables = {"UPSPIRAL_TRAINER": f"127.0.0.1:{port}", "UPSPIRAL_TRAINER_KEY": key}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "-m", "upspiral.trainer.rank"], env={**os.environ, **PATH, **variables}, cwd=folder
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)
