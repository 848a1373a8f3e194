"""What is left of sandboxes after many lives and deaths, and whether any death was told as a task's result.

    python benchmarks/sandbox_soak.py [--cycles 100000] [--kills 200] [--server] [--state FILE] [--save]

Owners (processes of their own, `sandbox_soak_owner.py`) go through cycles of create, exec and stop, eight at a time,
one in twenty with a fault: an agent killed, a start or a command cancelled, a sandbox stopped in a command, a
deadline. Meanwhile kill -9 meets, in turn, an owner, its keeper, both at once with the keeper unable to clear up, and
with --server a server that other owners lease from, and such an owner. Progress goes to stderr; with --state it is
kept in a file after every life, and a soak that was cut off goes on from there.

- `left_over`: after every death, and at the end: processes that descend from what was started here (this process is
  their subreaper, so none can get away), mounts and control groups with the label of an owner that was started here,
  ports of servers, and leases of a client that died. What nobody was there to remove is left to the sweep of the next
  owner, and counted at the end: the empty folder of an owner that was killed, and the groups of one that was killed
  with its keeper.
- `wrong`: results other than the one that the command must have. `unexplained`: SandboxErrors where nothing was
  killed. `hung`: cycles that did not end in two minutes. `crashed`: owners and servers that ended by an error of
  their own.
- `gone_s`: from a kill until the last process was gone: p50 and worst.
- `open_files`: of owners, at their first and last word, the most that any grew.
- `cycles`: those that an owner had told before it was killed; up to ten of each owner are not counted.
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
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from result import report
from sandbox_soak_owner import children_of
from upspiral.sandbox.namespace.leftovers import KIND
from upspiral.sandbox.owner import Owner

IN_FLIGHT = 8
GONE_TIMEOUT_S = 60.0
LIFE_TIMEOUT_S = 3600.0
HEARTBEAT_S = 5.0
AFTER_SERVER_S = 5.0
"""So long an owner goes on without its server: what it was at then fails, and has to say so."""
TARGETS = {"left_over": 0, "wrong": 0, "unexplained": 0, "hung": 0, "crashed": 0, "gone_s.worst": 5.0}
_PR_SET_CHILD_SUBREAPER = 36
_COUNTED = ("cycles", "errors", "wrong", "unexplained", "hung", "crashed", "agents killed")
_MAX_EXAMPLES = 10


@dataclass
class Tally:
    """What was seen so far."""

    totals: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    gone_s: list[float] = field(default_factory=list)
    grown: int = 0
    took_s: float = 0.0

    @classmethod
    def load(cls, path: Path | None) -> Tally:
        if path is None or not path.exists():
            return cls()
        told: dict[str, Any] = json.loads(path.read_text())
        told |= {name: Counter(told[name]) for name in ("totals", "killed", "left")}
        return cls(**told)

    def save(self, path: Path | None) -> None:
        """Whole or not at all."""
        if path is not None:
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(vars(self)))
            draft.rename(path)

    def figures(self) -> dict[str, Any]:
        gone_s = self.gone_s or [0.0]
        return {
            **{name.replace(" ", "_"): self.totals[name] for name in _COUNTED},
            "kills": dict(self.killed),
            "left_over": sum(self.left.values()),
            "left": {what: count for what, count in self.left.items() if count},
            "gone_s": {"p50": round(float(np.median(gone_s)), 3), "worst": round(max(gone_s), 3)},
            "open_files": self.grown,
            "took_s": round(self.took_s, 1),
            "examples": self.examples,
        }


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    token: str

    def leases(self) -> int:
        with urllib.request.urlopen(f"{self.url}/health", timeout=GONE_TIMEOUT_S) as answer:
            return json.load(answer)["leases"]

    def is_listening(self) -> bool:
        host, port = self.url.rpartition("/")[2].split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0


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


class Soak:
    """Starts owners, kills, and counts what is left."""

    def __init__(self, cycles: int, kills: int, kinds: tuple[str, ...], state: Path | None = None):
        self.tally = Tally.load(state)
        self._state = state
        self._folder = Path(tempfile.mkdtemp(prefix="sandbox-soak-", dir="/dev/shm"))
        self._chance = random.Random(7 + self.tally.totals["cycles"])
        self._cycles, self._kills, self._kinds = cycles, kills, kinds
        self._owners: set[Owner] = set()
        """All that were ever started here."""
        self._awaited: set[int] = set()
        """Living processes that somebody here waits for."""

    def run(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        tally, began_s = self.tally, time.monotonic() - self.tally.took_s
        try:
            while (missing := self._cycles - tally.totals["cycles"]) > 0 or sum(tally.killed.values()) < self._kills:
                kills_left = self._kills - sum(tally.killed.values())
                kind = min(self._kinds, key=lambda kind: tally.killed[kind]) if kills_left > 0 else ""
                self._live_and_die(kind, max(1, missing if not kind else missing // (kills_left + 1)))
                tally.took_s = time.monotonic() - began_s
                tally.save(self._state)
                self._say_progress()
            self._sweep()
        finally:
            for process in descendants():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _say_progress(self) -> None:
        tally = self.tally
        done = tally.totals["cycles"]
        ahead_min = max(0, self._cycles - done) * tally.took_s / max(done, 1) / 60
        told = {name: tally.totals[name] for name in _COUNTED if tally.totals[name]}
        left, killed = sum(tally.left.values()), sum(tally.killed.values())
        print(
            f"{killed} of {self._kills} kills, {told}, {left} left over; some {ahead_min:.0f} min to go",
            file=sys.stderr,
        )

    def _live_and_die(self, kind: str, cycles: int) -> None:
        """One owner, which is killed after so many cycles, or comes to its end after them where `kind` is ""."""
        life = self._begin(cycles if not kind else 10 * cycles + 1000, through_server="server" in kind)
        listener = threading.Thread(target=life.listen, daemon=True)
        listener.start()
        self._live_until_killed(life, kind, cycles)
        began_s = time.monotonic()
        if kind == "server":
            life.process.terminate()
        self._end(life.process)
        listener.join(GONE_TIMEOUT_S)
        if life.server is not None:
            self._end_server(life.server, is_killed=kind == "server")
        self._await_nothing()
        if kind and not kind.startswith("server"):
            self.tally.gone_s.append(time.monotonic() - began_s)
        if kind != "owner and keeper":
            self._count_groups()
        self._count(life)

    def _live_until_killed(self, life: Life, kind: str, cycles: int) -> None:
        """A keeper's death is not its owner's, who goes on and is killed later."""
        deadline_s = time.monotonic() + LIFE_TIMEOUT_S
        while life.process.poll() is None:
            if kind and life.tally.get("cycles", 0) >= cycles:
                time.sleep(self._chance.random() * 0.2)
                self._kill(kind, life)
                if kind != "keeper":
                    break
                cycles, kind = cycles + max(cycles, 20), "owner"
            assert time.monotonic() < deadline_s, f"an owner was not done within {LIFE_TIMEOUT_S:.0f} s: {life.tally}"
            self._reap()
            time.sleep(0.02)
        if kind == "server":
            time.sleep(AFTER_SERVER_S)

    def _begin(self, cycles: int, *, through_server: bool) -> Life:
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
        server = self._start_server(environment) if through_server else None
        arguments = [str(self._folder), str(cycles), str(IN_FLIGHT), str(self._chance.getrandbits(32))]
        if server is not None:
            arguments += [server.url, server.token, str(server.process.pid)]
        program = str(Path(__file__).with_name("sandbox_soak_owner.py"))
        return Life(self._start([sys.executable, program, *arguments], environment), server)

    def _start_server(self, environment: dict[str, str]) -> Server:
        token = secrets.token_hex(16)
        command = [sys.executable, "-m", "upspiral", "sandbox", "serve", "--port", "0", "--warm", "4"]
        command += ["--heartbeat-s", str(HEARTBEAT_S)]
        process = self._start(command, {**environment, "UPSPIRAL_SANDBOX_TOKEN": token})
        assert process.stdout is not None
        return Server(process, json.loads(process.stdout.readline())["url"], token)

    def _start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        self._owners.add(Owner.of_process(process.pid))
        self._awaited.add(process.pid)
        return process

    def _kill(self, kind: str, life: Life) -> None:
        owner = life.process.pid
        keepers = children_of(owner)
        self.tally.killed[kind] += 1
        if kind == "owner and keeper":
            for keeper in keepers:
                os.kill(keeper, signal.SIGSTOP)
        victims = {
            "owner": [owner], "server's owner": [owner], "keeper": keepers, "owner and keeper": [owner, *keepers],
            "server": [life.server.process.pid] if life.server else [],
        }[kind]  # fmt: skip
        assert victims, f"there was nobody to kill: {kind}"
        for process in victims:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _end(self, process: subprocess.Popen[str]) -> None:
        """Waits for it. Whoever was killed ended by that, and everybody else well."""
        code = process.wait(GONE_TIMEOUT_S)
        self._awaited.discard(process.pid)
        self.tally.totals["crashed"] += code not in (0, -signal.SIGKILL)

    def _end_server(self, server: Server, *, is_killed: bool) -> None:
        if not is_killed:
            deadline_s = time.monotonic() + GONE_TIMEOUT_S
            while (leases := server.leases()) and time.monotonic() < deadline_s:
                time.sleep(0.05)
            self.tally.left["leases"] += leases
            server.process.terminate()
        self._end(server.process)
        self.tally.left["ports"] += server.is_listening()

    def _await_nothing(self) -> None:
        deadline_s = time.monotonic() + GONE_TIMEOUT_S
        while (alive := descendants()) and time.monotonic() < deadline_s:
            self._reap()
            time.sleep(0.005)
        self.tally.left["processes"] += len(alive)
        self.tally.left["mounts"] += sum(self._names_an_owner(line) for line in mounts())

    def _reap(self) -> None:
        """Orphans that have come to this process. For those whom it started somebody waits."""
        for children in Path("/proc/self/task").glob("*/children"):
            with suppress(OSError):
                for process in map(int, children.read_text().split()):
                    if process not in self._awaited:
                        os.waitpid(process, os.WNOHANG)

    def _count(self, life: Life) -> None:
        for name in _COUNTED:
            self.tally.totals[name] += life.tally.get(name, 0)
        self.tally.examples = (self.tally.examples + life.tally.get("examples", []))[:_MAX_EXAMPLES]
        self.tally.grown = max(self.tally.grown, life.tally.get("open_files", 0) - life.first_open_files)

    def _sweep(self) -> None:
        """The next owner's start clears up after the dead ones; then nothing may be there."""
        for through_server in sorted({"server" in kind for kind in self._kinds}):
            life = self._begin(1, through_server=through_server)
            life.listen()
            self._end(life.process)
            if life.server is not None:
                self._end_server(life.server, is_killed=False)
        self._await_nothing()
        self._count_groups()
        self.tally.left["files"] += len(list(self._folder.iterdir())) + len(
            list(self._labelled(Path("/dev/shm"), depth=1))
        )

    def _count_groups(self) -> None:
        self.tally.left["control groups"] += len(list(self._labelled(Path("/sys/fs/cgroup"), depth=8)))

    def _labelled(self, folder: Path, depth: int) -> Iterator[Path]:
        """What carries the label of an owner that was started here and is dead."""
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if self._names_an_owner(entry.name):
                    yield Path(entry.path)
                elif depth > 1 and entry.is_dir(follow_symlinks=False):
                    yield from self._labelled(Path(entry.path), depth - 1)

    def _names_an_owner(self, text: str) -> bool:
        return any(Owner.of(part, KIND) in self._owners for part in re.split(r"[/\s]", text))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--server", action="store_true", help="also owners that lease from a server")
    parser.add_argument("--state", type=Path, help="a file to keep the progress in, and to go on from")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    kinds = ("owner", "keeper", "owner and keeper", *(["server", "server's owner"] if arguments.server else []))
    soak = Soak(arguments.cycles, arguments.kills, kinds, arguments.state)
    soak.run()
    report("sandbox_soak", soak.tally.figures(), TARGETS, save=arguments.save)


if __name__ == "__main__":
    main()
