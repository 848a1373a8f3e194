"""The fake sandbox: what goes wrong in it when it is told to, and that it satisfies the protocol."""

from __future__ import annotations

import asyncio
import io
import tarfile

import pytest

from upspiral.errors import SandboxError, SandboxGoneError
from upspiral.sandbox.base import Command, ExecResult, Process, Sandbox, SandboxBackend, SandboxSpec, Shell
from upspiral.sandbox.fake import FakeBackend, FakeSandbox, Faults, result

PLAIN = SandboxSpec()


async def starts(backend: FakeBackend, count: int) -> list[bool]:
    """Which of so many sandboxes could be made."""
    made = []
    for _ in range(count):
        try:
            async with backend.acquire(PLAIN):
                made.append(True)
        except SandboxError:
            made.append(False)
    return made


def test_it_satisfies_the_protocol() -> None:
    async def check() -> None:
        backend: SandboxBackend = FakeBackend([result("ran\n")])
        async with backend.acquire(PLAIN) as made:
            sandbox: Sandbox = made
            process: Process = await sandbox.spawn("anything")
            assert [each async for each in process.output()] == [("stdout", b"ran\n")]
            assert (await process.wait(timeout_s=1)).exit_code == 0
            shell: Shell = await sandbox.shell()
            assert (await shell.run("echo hi", timeout_s=1)).stdout == b"hi\n"
            await shell.close()

    asyncio.run(check())


def test_starts_fail_first_or_by_chance_which_a_seed_repeats() -> None:
    async def check() -> None:
        assert await starts(FakeBackend(faults=Faults(start_failures=2)), 4) == [False, False, True, True]
        faults = [Faults(start_failure_rate=0.5, seed=seed) for seed in (1, 1, 2)]
        first, again, other = [await starts(FakeBackend(faults=each), 60) for each in faults]
        assert first == again != other
        assert 15 < sum(first) < 45

    asyncio.run(check())


def test_commands_take_their_time_and_run_into_their_deadline() -> None:
    async def check() -> None:
        sandbox = FakeSandbox(PLAIN, faults=Faults(command_s=0.05))
        assert (await sandbox.exec("echo hi", timeout_s=1)).stdout == b"hi\n"
        late = await sandbox.exec("echo hi > late", timeout_s=0.01)
        assert (late.timed_out, late.exit_code, await sandbox.list_files()) == (True, None, [])

    asyncio.run(check())


def test_a_hang_outlasts_its_deadline_and_ends_with_who_waits() -> None:
    async def check() -> None:
        sandbox = FakeSandbox(PLAIN, faults=Faults(hang_at=0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await sandbox.exec("true", timeout_s=0.01)
        assert (await sandbox.exec("echo on", timeout_s=1)).stdout == b"on\n"

    asyncio.run(check())


def test_broken_is_not_gone_and_both_last() -> None:
    async def check() -> None:
        broken, gone = FakeSandbox(PLAIN, faults=Faults(break_at=1)), FakeSandbox(PLAIN, faults=Faults(gone_at=1))
        for sandbox, error in ((broken, SandboxError), (gone, SandboxGoneError)):
            await sandbox.exec("echo fine", timeout_s=1)
            for attempt in (
                sandbox.exec("echo x > a", timeout_s=1),
                sandbox.read("a"),
                sandbox.exec("true", timeout_s=1),
            ):
                with pytest.raises(SandboxError) as caught:
                    await attempt
                assert caught.type is error
        assert (broken.commands, gone.commands) == (["echo fine", "echo x > a"], ["echo fine"])

    asyncio.run(check())


def test_a_dropped_command_has_run_and_a_retry_by_name_gets_its_result() -> None:
    async def check() -> None:
        sandbox = FakeSandbox(PLAIN, faults=Faults(drop_at=0))
        named = Command("echo once > log", op_id="a")
        with pytest.raises(SandboxError, match="connection"):
            await sandbox.exec(named, timeout_s=1)
        assert (await sandbox.exec(named, timeout_s=1)).exit_code == 0
        assert (sandbox.commands, await sandbox.read("log")) == (["echo once > log"], b"once\n")

    asyncio.run(check())


def test_a_command_that_is_delivered_twice_runs_twice_unless_it_has_a_name() -> None:
    async def check(command: Command, times: int) -> None:
        sandbox = FakeSandbox(PLAIN, faults=Faults(repeat_at=0))
        await sandbox.exec(command, timeout_s=1)
        assert len(sandbox.commands) == times

    asyncio.run(check(Command("echo x"), 2))
    asyncio.run(check(Command("echo x", op_id="a"), 1))


def test_archives_and_differences() -> None:
    async def check() -> None:
        sandbox = FakeSandbox(SandboxSpec(files={"a/b": b"1", "gone": b"2", "same": b"3"}))
        await sandbox.upload(await sandbox.download("a"), "copy")
        assert await sandbox.list_files() == ["a/b", "copy/b", "gone", "same"]
        del sandbox.files["gone"]
        await sandbox.write("a/b", b"new")
        diff = await sandbox.diff()
        with tarfile.open(fileobj=io.BytesIO(diff.archive)) as tar:
            assert tar.getnames() == ["work/a/b", "work/copy/b"]
        assert diff.removed == ["/work/gone"]

    asyncio.run(check())


def test_a_snapshot_lasts_until_it_is_dropped() -> None:
    async def check() -> None:
        backend = FakeBackend()
        async with backend.acquire(SandboxSpec(files={"a": b"1"})) as sandbox:
            snapshot = await sandbox.snapshot()
            await sandbox.write("a", b"2")
        async with backend.acquire(SandboxSpec(image=snapshot)) as later:
            assert await later.read("a") == b"1"
            await backend.drop(snapshot)
            assert await later.read("a") == b"1"
            with pytest.raises(SandboxError, match="no snapshot"):
                await later.restore(snapshot)

    asyncio.run(check())


@pytest.mark.parametrize("name", ["", "a"])
def test_stopping_ends_a_command_that_hangs(name: str) -> None:
    async def check() -> None:
        sandbox = FakeSandbox(PLAIN, faults=Faults(hang_at=0))
        hanging = asyncio.create_task(sandbox.exec(Command("true", op_id=name), timeout_s=1))
        await asyncio.sleep(0)
        await sandbox.stop()
        with pytest.raises(SandboxGoneError):
            await asyncio.wait_for(hanging, 5)

    asyncio.run(check())


def test_a_fork_has_the_files_of_its_parent_alone_and_ends_with_the_backend() -> None:
    async def check() -> None:
        backend = FakeBackend()
        async with backend.acquire(SandboxSpec(files={"/work/a": b"1", "b": b"2"})) as first:
            image = await first.snapshot()
        async with backend.acquire(SandboxSpec(image=image)) as second:
            assert await second.read("a") == b"1"
            assert (await second.diff()).removed == []
            del second.files["a"]
            (fork,) = await second.fork()
            assert await fork.list_files() == ["b"]
        assert await fork.list_files() == ["b"]
        await backend.stop()
        with pytest.raises(SandboxGoneError):
            await fork.list_files()

    asyncio.run(check())


def test_truncation_is_what_was_dropped() -> None:
    assert ExecResult(0, b"", b"", dropped_bytes=1).truncated and not ExecResult(0, b"", b"").truncated
