"""The worker pool with real processes: answers, crashes, hangs, blocked loops, dead workers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from upspiral.agent.base import AgentTask
from upspiral.agent.pool import WorkerPool
from upspiral.errors import AgentError, DeadlineError
from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.fake import FakeBackend

AGENT = """
import asyncio, os, time

async def agent(task):
    print("noise on stdout must not garble the protocol")
    if task.instruction == "crash":
        raise RuntimeError("boom")
    if task.instruction == "hang":
        await asyncio.sleep(1000)
    if task.instruction == "block":
        time.sleep(1000)
    if task.instruction == "die":
        os._exit(3)
    await asyncio.sleep(0.05)
    return task.instruction.upper() + " " + task.api_key
"""


def task(instruction: str, name: str = "r") -> AgentTask:
    return AgentTask(name, instruction, "model", "http://127.0.0.1:1/v1", "key", "http://127.0.0.1:1/tools", "tk")


async def run(pool: WorkerPool, instruction: str, name: str = "r", timeout_s: float = 20.0) -> str:
    async with FakeBackend().acquire(SandboxSpec()) as sandbox:
        return await pool.run(task(instruction, name), sandbox, timeout_s=timeout_s)


@pytest.fixture
def agent_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_agent.py"
    path.write_text(AGENT)
    return path


def with_pool(agent_file: Path, body, workers: int = 1):
    async def main():
        pool = WorkerPool(agent_file, workers=workers)
        await pool.start()
        try:
            return await body(pool)
        finally:
            await pool.stop()

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_many_rollouts_share_a_worker(agent_file: Path) -> None:
    async def body(pool: WorkerPool) -> list[str]:
        return await asyncio.gather(*(run(pool, f"t{i}", f"r{i}") for i in range(40)))

    started = time.monotonic()
    assert with_pool(agent_file, body) == [f"T{i} key" for i in range(40)]
    assert time.monotonic() - started < 20


def test_a_crash_names_the_exception_and_the_line(agent_file: Path) -> None:
    async def body(pool: WorkerPool) -> str:
        with pytest.raises(AgentError, match=r"RuntimeError: boom \(my_agent.py:7\)"):
            await run(pool, "crash")
        return await run(pool, "still alive")

    assert with_pool(agent_file, body) == "STILL ALIVE key"


def test_a_hang_ends_at_the_deadline_and_spares_the_others(agent_file: Path) -> None:
    async def body(pool: WorkerPool) -> str:
        other = asyncio.create_task(run(pool, "hang", "other", timeout_s=8.0))
        with pytest.raises(DeadlineError, match=r"0\.3 s"):
            await run(pool, "hang", "mine", timeout_s=0.3)
        assert not other.done()
        other.cancel()
        return await run(pool, "next", "next")

    assert with_pool(agent_file, body) == "NEXT key"


def test_a_blocked_worker_is_replaced(agent_file: Path) -> None:
    async def body(pool: WorkerPool) -> str:
        with pytest.raises(DeadlineError):
            await run(pool, "block", timeout_s=0.3)
        return await run(pool, "again")

    assert with_pool(agent_file, body) == "AGAIN key"


def test_a_dead_worker_fails_its_rollouts_and_is_replaced(agent_file: Path) -> None:
    async def body(pool: WorkerPool) -> str:
        with pytest.raises(AgentError, match="worker process died"):
            await run(pool, "die")
        return await run(pool, "again")

    assert with_pool(agent_file, body) == "AGAIN key"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def agent(task): ...", "must define `async def agent"),
        ("x = 1", "must define `async def agent"),
        ("import no_such_module_here", "no_such_module_here"),
        ("raise SystemExit('no')", "SystemExit"),
    ],
)
def test_a_file_that_is_no_agent_is_refused_at_start(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)

    async def main() -> None:
        with pytest.raises(AgentError, match=message):
            await WorkerPool(path, workers=1).start()

    asyncio.run(main())
