"""The owner of sandboxes whom `sandbox_soak.py` starts and kills: cycles of create, exec, stop, one in twenty with a
fault.

    python benchmarks/sandbox_soak_owner.py FOLDER CYCLES IN_FLIGHT SEED [URL TOKEN PROCESS]

The last three are a server's, from which sandboxes are then leased. A line of JSON with the tally so far is printed
every ten cycles, when something is wrong, at SIGTERM and at the end. Each command prints what only its own sandbox
knows and ends with 7, so any other result is one that infrastructure made up (`wrong`). A SandboxError is
`unexplained` when neither an agent nor a keeper was killed, nor the server, while its cycle went on.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from upspiral.errors import DeadlineError, SandboxError, SandboxGoneError
from upspiral.sandbox.base import ExecResult, Sandbox, SandboxBackend, SandboxSpec

FAULTS = ("cancelled start", "killed agent", "stopped in a command", "timeout", "cancelled command")
FAULT_SHARE = 0.05
EXIT_CODE = 7
TIMEOUT_S = 60.0
SETTLE_S = 0.1
"""A process that is killed lets go of its sockets before it is seen to be dead."""
_REPORT_EVERY = 10
_MAX_EXAMPLES = 5


class Owner:
    """Counts what happens to its cycles."""

    def __init__(self, backend: SandboxBackend, seed: int, *, maker: int):
        """`maker`: the process whose children are keepers; this one, or a server."""
        self.tally: Counter[str] = Counter()
        self.examples: list[str] = []
        self._backend = backend
        self._chance = random.Random(seed)
        self._maker = maker
        self._agents_killed = 0

    async def run(self, cycles: int, in_flight: int) -> None:
        left = iter(range(cycles))

        async def hand() -> None:
            for number in left:
                await self._cycle(number)
                if self.tally["cycles"] % _REPORT_EVERY == 0:
                    self.report()

        await asyncio.gather(*(hand() for _ in range(in_flight)))

    def report(self) -> None:
        open_files = len(os.listdir("/proc/self/fd"))
        print(json.dumps({**self.tally, "open_files": open_files, "examples": self.examples}), flush=True)

    async def _cycle(self, number: int) -> None:
        fault = self._chance.choice(FAULTS) if self._chance.random() < FAULT_SHARE else ""
        token = f"{number}-{self._chance.getrandbits(64):x}"
        before = self._circumstances()
        self.tally[fault or "without fault"] += 1
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                if fault == "cancelled start":
                    await self._cancelled_start(token)
                else:
                    async with self._backend.acquire(SandboxSpec(files={"token": token.encode()})) as sandbox:
                        await self._use(sandbox, token, fault)
        except SandboxError as error:
            self.tally["errors"] += 1
            await asyncio.sleep(SETTLE_S)
            if before == self._circumstances():
                self._note("unexplained", f"{fault or 'no fault'}: {type(error).__name__}: {error}")
        except TimeoutError:
            self._note("hung", fault or "no fault")
        self.tally["cycles"] += 1

    async def _use(self, sandbox: Sandbox, token: str, fault: str) -> None:
        if fault == "timeout":
            done = await sandbox.exec("cat token; sleep 1000", timeout_s=0.2)
            if not done.timed_out or done.exit_code is not None or done.stdout not in (b"", token.encode()):
                self._note("wrong", f"timeout: {done}")
        elif fault == "cancelled command":
            with suppress(TimeoutError):
                async with asyncio.timeout(self._chance.random() * 0.1):
                    await sandbox.exec("sleep 1000 & sleep 1000", timeout_s=TIMEOUT_S)
        elif fault in ("killed agent", "stopped in a command"):
            running = asyncio.create_task(sandbox.exec(f"cat token; sleep 0.1; exit {EXIT_CODE}", timeout_s=TIMEOUT_S))
            await asyncio.sleep(self._chance.random() * 0.15)
            if fault == "killed agent":
                self._kill_an_agent()
            else:
                await sandbox.stop()
            with suppress(SandboxGoneError):
                self._judge(await running, token)
            if fault == "stopped in a command":
                return
        self._judge(await sandbox.exec(f"cat token; exit {EXIT_CODE}", timeout_s=TIMEOUT_S), token)

    async def _cancelled_start(self, token: str) -> None:
        async def hold() -> None:
            async with self._backend.acquire(SandboxSpec(files={"token": token.encode()})) as sandbox:
                await sandbox.exec("sleep 1000", timeout_s=TIMEOUT_S)

        task = asyncio.create_task(hold())
        await asyncio.sleep(self._chance.random() * 0.03)
        task.cancel()
        with suppress(asyncio.CancelledError, DeadlineError):
            await task

    def _judge(self, done: ExecResult, token: str) -> None:
        if (done.exit_code, done.stdout) != (EXIT_CODE, token.encode()):
            self._note("wrong", str(done))

    def _note(self, kind: str, what: str) -> None:
        self.tally[kind] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{kind}: {what}"[:500])
        self.report()  # it may be killed before it is asked again

    def _kill_an_agent(self) -> None:
        """Somebody's. Whose it is need not be known: everybody's results have to be right."""
        agents = [agent for keeper in children_of(self._maker) for agent in children_of(keeper)]
        if agents:
            with suppress(ProcessLookupError):
                os.kill(self._chance.choice(agents), signal.SIGKILL)
            self._agents_killed += 1
            self.tally["agents killed"] += 1

    def _circumstances(self) -> tuple[int, Any]:
        """Different when something was killed since."""
        return self._agents_killed, sorted(children_of(self._maker))


def children_of(process: int) -> list[int]:
    """Living ones."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(each) for each in path.read_text().split() if is_alive(int(each))]
    return found


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def main() -> None:
    folder, cycles, in_flight, seed, *server = sys.argv[1:]
    if server:
        from upspiral.sandbox.remote import RemoteBackend

        backend: SandboxBackend = RemoteBackend(server[0], server[1], patience_s=2.0)
    else:
        from upspiral.sandbox.namespace import NamespaceBackend

        backend = NamespaceBackend(Path(folder))
    owner = Owner(backend, int(seed), maker=int(server[2]) if server else os.getpid())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: (owner.report(), os._exit(0)))
    try:
        await owner.run(int(cycles), int(in_flight))
    finally:
        await backend.stop()
        owner.report()


if __name__ == "__main__":
    asyncio.run(main())
