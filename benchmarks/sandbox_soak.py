"""What is left of sandboxes after many lives and deaths, and whether any death was told as a task's result.

    python benchmarks/sandbox_soak.py [--cycles 100000] [--kills 200] [--server] [--save]

Owners (processes of their own, `sandbox_soak_owner.py`) go through cycles of create, exec and stop, several at a time, one in
twenty with a fault: an agent killed, a start or a command cancelled, a sandbox stopped in a command, a deadline. Meanwhile
kill -9 meets, in turn, an owner, its keeper, both at once with the keeper unable to clear up, and with --server a server
that other owners lease from, and such an owner.

- `left_over`: after every death, and at the end: processes that descend from what was started here (this process is their
  subreaper, so none can get away), mounts and control groups of theirs, files below their folder, ports of their servers.
  Folders and groups of an owner that died with its keeper are left to the sweep of the next owner, and counted after it.
- `wrong`: results other than the one that the command must have. `unexplained`: SandboxErrors where nothing was killed.
  `hung`: cycles that did not end in two minutes.
- `gone_s`: from a kill until the last process was gone: p50 and worst.
- `open_files`: of owners, at their first and last word, the most that any grew.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from result import report
from sandbox_soak_owner import children_of

IN_FLIGHT = 8
GONE_TIMEOUT_S = 60.0
OWNER_TIMEOUT_S = 3600.0
TARGETS = {"left_over": 0, "wrong": 0, "unexplained": 0, "hung": 0, "gone_s.worst": 5.0}
_PR_SET_CHILD_SUBREAPER = 36
_COUNTED = ("cycles", "errors", "wrong", "unexplained", "hung", "agents killed")


@dataclass
class Life:
    """An owner: its process and its last words."""

    process: subprocess.Popen[str]
    server: Server | None
    tally: dict[str, Any] = field(default_factory=dict)
    first_open_files: int = 0

    def listen(self) -> None:
        """To what it prints, to its end."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(ValueError):  # the last line of a killed process may be half of one
                self.tally = json.loads(line)
                self.first_open_files = self.first_open_files or self.tally["open_files"]


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    token: str


class Soak:
    """Starts owners, kills, and counts what is left."""

    def __init__(self, cycles: int, kills: int, *, with_server: bool, seed: int = 7):
        self._folder = Path(tempfile.mkdtemp(prefix="sandbox-soak-", dir="/dev/shm"))
        self._chance = random.Random(seed)
        self._cycles, self._kills, self._with_server = cycles, kills, with_server
        self._owners: set[int] = set()
        self.totals: Counter[str] = Counter()
        self.killed: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.examples: list[str] = []
        self.gone_s: list[float] = []
        self.grown = 0

    def run(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            while (missing := self._cycles - self.totals["cycles"]) > 0:
                kills_left = self._kills - sum(self.killed.values())
                each = missing if kills_left <= 0 else max(1, missing // (kills_left + 1))
                self._live_and_die(missing, each, kind=self._kind() if kills_left > 0 else "")
            self._sweep()
        finally:
            for process in descendants():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kind(self) -> str:
        kinds = ["owner", "keeper", "owner and keeper", *(["server", "server's owner"] if self._with_server else [])]
        return kinds[sum(self.killed.values()) % len(kinds)]

    def _live_and_die(self, cycles: int, before_kill: int, kind: str) -> None:
        """One owner, until it has been killed or has come to its end. A keeper's death is not its owner's."""
        life = self._begin(cycles if kind in ("", "keeper") else before_kill * 4, through_server="server" in kind)
        listener = threading.Thread(target=life.listen, daemon=True)
        listener.start()
        next_kill = before_kill
        deadline = time.monotonic() + OWNER_TIMEOUT_S
        while life.process.poll() is None and time.monotonic() < deadline:
            if kind and life.tally.get("cycles", 0) >= next_kill:
                time.sleep(self._chance.random() * 0.2)
                self._kill(kind, life)
                if kind != "keeper":
                    break
                next_kill, kind = next_kill + before_kill, "owner"
            self._reap()
            time.sleep(0.02)
        began = time.monotonic()
        life.process.wait(GONE_TIMEOUT_S)
        self._end_server(life)
        self._await_nothing(began)
        listener.join(GONE_TIMEOUT_S)
        self._count(life)

    def _begin(self, cycles: int, *, through_server: bool) -> Life:
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
        server = self._start_server(environment) if through_server else None
        arguments = [str(self._folder), str(cycles), str(IN_FLIGHT), str(self._chance.getrandbits(32))]
        if server is not None:
            arguments += [server.url, server.token]
        program = str(Path(__file__).with_name("sandbox_soak_owner.py"))
        process = subprocess.Popen(
            [sys.executable, program, *arguments], stdout=subprocess.PIPE, env=environment, text=True
        )
        self._owners.add(process.pid)
        return Life(process, server)

    def _start_server(self, environment: dict[str, str]) -> Server:
        token = secrets.token_hex(16)
        process = subprocess.Popen(
            [sys.executable, "-m", "upspiral", "sandbox", "serve", "--port", "0", "--warm", "4"],
            stdout=subprocess.PIPE, env={**environment, "UPSPIRAL_SANDBOX_TOKEN": token}, text=True,
        )  # fmt: skip
        self._owners.add(process.pid)
        assert process.stdout is not None
        return Server(process, json.loads(process.stdout.readline())["url"], token)

    def _kill(self, kind: str, life: Life) -> None:
        owner = life.process.pid
        victim = life.server.process.pid if kind == "server" and life.server else owner
        keepers = children_of(owner)
        self.killed[kind] += 1
        if kind == "owner and keeper":
            for keeper in keepers:
                os.kill(keeper, signal.SIGSTOP)
        for process in (keepers if kind == "keeper" else [victim]) + (keepers if kind == "owner and keeper" else []):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if kind == "server":
            life.process.terminate()

    def _end_server(self, life: Life) -> None:
        if life.server is None:
            return
        life.server.process.kill()
        life.server.process.wait(GONE_TIMEOUT_S)
        host, port = life.server.url.rpartition("/")[2].split(":")
        with socket.socket() as probe:
            self.left["ports"] += probe.connect_ex((host, int(port))) == 0

    def _await_nothing(self, began: float) -> None:
        deadline = time.monotonic() + GONE_TIMEOUT_S
        while (alive := descendants()) and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.005)
        self.gone_s.append(time.monotonic() - began)
        self.left["processes"] += len(alive)
        self.left["mounts"] += sum("upspiral-" in line or str(self._folder) in line for line in mounts())

    def _reap(self) -> None:
        """Orphans that have come to this process. For those whom it started somebody waits."""
        for children in Path("/proc/self/task").glob("*/children"):
            for process in map(int, children.read_text().split()):
                if process not in self._owners:
                    with suppress(OSError):
                        os.waitpid(process, os.WNOHANG)

    def _count(self, life: Life) -> None:
        for name in _COUNTED:
            self.totals[name] += life.tally.get(name, 0)
        self.examples += life.tally.get("examples", [])
        self.grown = max(self.grown, life.tally.get("open_files", 0) - life.first_open_files)

    def _sweep(self) -> None:
        """The next owner's start clears up after the dead ones; then nothing may be there."""
        for through_server in (False, *([True] if self._with_server else [])):
            life = self._begin(1, through_server=through_server)
            life.listen()
            life.process.wait(GONE_TIMEOUT_S)
            if life.server is not None:
                life.server.process.terminate()
                life.server.process.wait(GONE_TIMEOUT_S)
        self._await_nothing(time.monotonic())
        self.left["files"] += len(list(self._folder.iterdir())) + len(list(self._labelled(Path("/dev/shm"), depth=1)))
        self.left["control groups"] += len(list(self._labelled(Path("/sys/fs/cgroup"), depth=8)))

    def _labelled(self, folder: Path, depth: int) -> Iterator[Path]:
        """What carries the label of an owner that was started here: a name with its process id in it."""
        ids = "|".join(map(str, self._owners))
        label = re.compile(rf"upspiral-[a-z]+-[0-9a-f]+-\d+-({ids})-\d+-[0-9a-f]+")
        with suppress(OSError):
            for entry in os.scandir(folder):
                if label.fullmatch(entry.name):
                    yield Path(entry.path)
                elif depth > 1 and entry.is_dir(follow_symlinks=False):
                    yield from self._labelled(Path(entry.path), depth - 1)


def descendants() -> list[int]:
    """Of this process, alive."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(path.parent.name))
    found, waiting = list[int](), [os.getpid()]
    while waiting:
        below = parents.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


def figures_of(soak: Soak) -> dict[str, Any]:
    return {
        **{name.replace(" ", "_"): soak.totals[name] for name in _COUNTED},
        "kills": dict(soak.killed),
        "left_over": sum(soak.left.values()),
        "left": dict(soak.left),
        "gone_s": {"p50": round(float(np.median(soak.gone_s)), 3), "worst": round(max(soak.gone_s), 3)},
        "open_files": soak.grown,
        "examples": soak.examples[:10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--server", action="store_true", help="also owners that lease from a server")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    soak = Soak(arguments.cycles, arguments.kills, with_server=arguments.server)
    began = time.monotonic()
    soak.run()
    figures = {**figures_of(soak), "took_s": round(time.monotonic() - began, 1)}
    report("sandbox_soak", figures, TARGETS, save=arguments.save)


if __name__ == "__main__":
    main()
