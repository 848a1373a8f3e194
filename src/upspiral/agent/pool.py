"""Warm worker processes for `async def agent(task)`.

A worker runs many rollouts in one event loop, since they mostly wait. A rollout that hangs in `await` is cancelled at
its deadline; a worker that blocks its loop, or dies, is replaced, and its other rollouts fail with that reason.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from upspiral.agent.base import AgentTask
from upspiral.errors import AgentError, DeadlineError
from upspiral.sandbox.base import Sandbox, SandboxSpec

START_TIMEOUT_S = 60.0
CANCEL_GRACE_S = 2.0
STDERR_LINES = 20
MAX_LINE_BYTES = 1 << 24


class _WorkerProcess:
    """The parent's end of one worker."""

    def __init__(self, agent_file: Path) -> None:
        self._agent_file = agent_file
        self._process: asyncio.subprocess.Process | None = None
        self._answers: dict[str, asyncio.Future[str]] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._reading = False
        """False once the worker closed its end, which is known before the process is reaped."""

    @property
    def load(self) -> int:
        return len(self._answers)

    @property
    def alive(self) -> bool:
        return self._reading and self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "upspiral.agent.worker", str(self._agent_file)),
            **{"stdin": pipe, "stdout": pipe, "stderr": pipe, "limit": MAX_LINE_BYTES, "env": environment},
        )
        self._readers = [asyncio.create_task(self._read_stderr())]
        try:
            first = await asyncio.wait_for(self._read_message(), START_TIMEOUT_S)
        except TimeoutError as error:
            await self.stop()
            raise DeadlineError(
                f"{self._agent_file} was not imported within {START_TIMEOUT_S:.0f} s; does it do work at import?"
            ) from error
        if first is None or "fatal" in first:
            await self.stop()
            reason = (first or {}).get("fatal") or "the process ended: " + self._last_words()
            raise AgentError(f"agent file {self._agent_file} cannot be used: {reason}")
        self._reading = True
        self._readers.append(asyncio.create_task(self._read_answers()))

    async def run(self, task: AgentTask, timeout_s: float) -> str:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answers[task.id] = answer
        try:
            self._send({"id": task.id, "task": asdict(task)})
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError as error:
            raise DeadlineError(f"the agent did not answer within {timeout_s:g} s") from error
        finally:
            self._answers.pop(task.id, None)
            if not (answer.done() and not answer.cancelled()):
                self._send({"id": task.id, "cancel": True})

    async def responds(self) -> bool:
        """Whether the worker's event loop still turns: it must answer a ping within the grace time."""
        ping = AgentTask("ping", "", "", "", "", "", "")
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answers[ping.id] = answer
        self._send({"id": ping.id, "ping": True})
        try:
            await asyncio.wait_for(answer, CANCEL_GRACE_S)
        except (TimeoutError, AgentError):
            return False
        finally:
            self._answers.pop(ping.id, None)
        return True

    async def stop(self) -> None:
        if self._process is None:
            return
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._fail_all("the worker was stopped")

    def _send(self, message: dict[str, Any]) -> None:
        if self.alive and self._process is not None and self._process.stdin is not None:
            self._process.stdin.write((json.dumps(message) + "\n").encode())

    async def _read_message(self) -> dict[str, Any] | None:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        return json.loads(line) if line else None

    async def _read_answers(self) -> None:
        while (message := await self._read_message()) is not None:
            future = self._answers.get(message["id"])
            if future is None or future.done():
                continue
            if "error" in message:
                future.set_exception(AgentError(f"the agent crashed: {message['error']}"))
            else:
                future.set_result(message["answer"])
        self._reading = False
        self._fail_all("the worker process died: " + self._last_words())

    async def _read_stderr(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        while line := await self._process.stderr.readline():
            self._stderr.append(line.decode(errors="replace").rstrip())

    def _fail_all(self, reason: str) -> None:
        for future in self._answers.values():
            if not future.done():
                future.set_exception(AgentError(reason))

    def _last_words(self) -> str:
        return " | ".join(self._stderr)[-500:] or "it printed nothing"


class WorkerPool:
    """Runs agents of a user's file. Satisfies AgentRunner."""

    def __init__(self, agent_file: Path, *, workers: int) -> None:
        self._agent_file = agent_file
        self._workers = [_WorkerProcess(agent_file) for _ in range(workers)]
        self._replacing = asyncio.Lock()

    def furnish(self, spec: SandboxSpec, gateway_socket: str) -> SandboxSpec:
        del gateway_socket  # the agent runs outside
        return spec

    async def start(self) -> None:
        """Raises AgentError when the file cannot be imported or defines no `async def agent(task)`."""
        await asyncio.gather(*(worker.start() for worker in self._workers))

    async def run(self, task: AgentTask, sandbox: Sandbox, *, timeout_s: float) -> str:
        del sandbox  # the agent reaches it through the tools' address
        worker = await self._least_loaded()
        try:
            return await worker.run(task, timeout_s)
        except DeadlineError:
            if not await worker.responds():
                await self._replace(worker)
            raise

    async def stop(self) -> None:
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def _least_loaded(self) -> _WorkerProcess:
        worker = min(self._workers, key=lambda candidate: candidate.load)
        return worker if worker.alive else await self._replace(worker)

    async def _replace(self, broken: _WorkerProcess) -> _WorkerProcess:
        async with self._replacing:
            if broken not in self._workers:  # another rollout of the same worker was first
                return min(self._workers, key=lambda candidate: candidate.load)
            await broken.stop()
            fresh = _WorkerProcess(self._agent_file)
            await fresh.start()
            self._workers[self._workers.index(broken)] = fresh
            return fresh
