"""Sandboxes over a real server: what goes through, what lost connections do to it, and who may not do what."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sandbox.cut_line import cut_line
from tests.unit.sandbox.live_server import ALICE, BOB, LiveServer, live_server, server_process
from upspiral.cli.main import run_command
from upspiral.errors import CapabilityError, ConfigError, SandboxBusyError, SandboxError, SandboxGoneError
from upspiral.sandbox.base import Command, Diff, SandboxSpec
from upspiral.sandbox.fake import FakeBackend
from upspiral.sandbox.inside import frames
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.sandbox.pool import PoolLimits
from upspiral.sandbox.process import ProcessBackend
from upspiral.sandbox.registry import make_backend
from upspiral.sandbox.remote import RemoteBackend
from upspiral.sandbox.remote.backend import _BEATS
from upspiral.sandbox.remote.line import back_within_s
from upspiral.sandbox.server.relay import MOST_OPERATIONS
from upspiral.sandbox.server.session import MISBEHAVED
from upspiral.sandbox.server.wire import HEARTBEAT_S, PATIENCE_S, RETURN_S

SPEC = SandboxSpec()
CAPABLE_OF_NOTHING = "this server's sandboxes have no agent"
TIMEOUT_S = 30.0
"""Generous: the machine may be busy. Nothing here comes near it."""


@contextmanager
def open_folder() -> Iterator[Path]:
    """One that the sandboxes' own users may pass through, as pytest's may not be."""
    with tempfile.TemporaryDirectory(prefix="upspiral-remote-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@pytest.fixture
def root() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


@asynccontextmanager
async def remote(url: str, token: str = ALICE) -> AsyncIterator[RemoteBackend]:
    backend = RemoteBackend(url, token)
    try:
        yield backend
    finally:
        await backend.stop()


@asynccontextmanager
async def process_server(root: Path, heartbeat_s: float) -> AsyncIterator[LiveServer]:
    async with live_server(ProcessBackend(root, allow_network=True), heartbeat_s=heartbeat_s) as live:
        yield live


def run(check: Callable[[LiveServer], Awaitable[None]], root: Path, heartbeat_s: float = 60.0) -> None:
    async def play() -> None:
        async with process_server(root, heartbeat_s) as live:
            await asyncio.wait_for(check(live), 2 * TIMEOUT_S)
        assert list(root.iterdir()) == []

    asyncio.run(play())


async def until(condition: Callable[[], bool], what: str) -> None:
    ends_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends_at, f"waited 10 s for {what}"
        await asyncio.sleep(0.01)


def test_everything_goes_through(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with remote(live.url) as backend:
            async with backend.acquire(SandboxSpec(files={"a": b"text"}, env={"X": "1"})) as sandbox:
                done = await sandbox.exec("cat a; echo $X >&2; exit 3", timeout_s=TIMEOUT_S)
                assert (done.exit_code, done.stdout, done.stderr) == (3, b"text", b"1\n")
                big = os.urandom(5_000_000)
                await sandbox.write("folder/big", big)
                assert await sandbox.read("folder/big", max_bytes=1 << 24) == big
                with pytest.raises(FileNotFoundError, match="nothing"):
                    await sandbox.read("nothing")
                shell = await sandbox.shell()
                await shell.run("cd folder; Y=2", timeout_s=TIMEOUT_S)
                assert (await shell.run("echo $Y; ls", timeout_s=TIMEOUT_S)).stdout == b"2\nbig\n"
                program = await sandbox.spawn("cat; echo end >&2")
                await program.write(b"hello")
                await program.close_stdin()
                assert [piece async for piece in program.output()] == [("stdout", b"hello"), ("stderr", b"end\n")]
                assert (await program.wait(timeout_s=TIMEOUT_S)).exit_code == 0
                await sandbox.upload(await sandbox.download("folder"), "copy")
                assert await sandbox.list_files() == ["a", "copy/big", "folder/big"]
                with pytest.raises(CapabilityError):
                    await sandbox.snapshot()
                with pytest.raises(CapabilityError):
                    await sandbox.fork(2)
            await until(lambda: live.pool.stats.live == 0, "the sandbox to stop")
            with pytest.raises(SandboxGoneError):
                await sandbox.exec("true", timeout_s=TIMEOUT_S)

    run(check, root)


def test_a_command_through_the_server_takes_little_longer(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with remote(live.url) as backend, backend.acquire(SPEC) as there:
            here = next(iter(live.pool._given)).sandbox
            taken_ms: dict[object, list[float]] = {there: [], here: []}
            for _ in range(50):
                for sandbox, taken in taken_ms.items():
                    began = time.perf_counter()
                    await sandbox.exec("true", timeout_s=TIMEOUT_S)  # type: ignore[attr-defined]
                    taken.append((time.perf_counter() - began) * 1000)
            medians = {sandbox: statistics.median(taken) for sandbox, taken in taken_ms.items()}
            # The promise is 5 ms on a quiet machine; how much longer it takes does not depend on the machine so much.
            assert medians[there] < 3 * medians[here] + 3

    run(check, root)


def test_lost_connections_are_not_noticed(root: Path) -> None:
    """Commands that must not run twice run once; a shell, a program and a large file go on where they were."""

    async def check(live: LiveServer) -> None:
        async with cut_line(live.url) as line, remote(line.url) as backend, backend.acquire(SPEC) as sandbox:
            cutting = asyncio.create_task(line.cut_every(0.08))
            big = os.urandom(8_000_000)
            shell = await sandbox.shell()
            await shell.run("count=0", timeout_s=TIMEOUT_S)
            program = await sandbox.spawn("while read line; do echo got $line; done")

            async def commands() -> None:
                for _ in range(20):
                    await sandbox.exec("echo x >> log; sleep 0.02", timeout_s=TIMEOUT_S)

            async def lines() -> None:
                for number in range(20):
                    done = await shell.run("count=$((count + 1)); echo $count", timeout_s=TIMEOUT_S)
                    assert done.stdout == b"%d\n" % (number + 1)

            async def echoes() -> None:
                for number in range(20):
                    await program.write(f"{number}\n".encode())
                    await asyncio.sleep(0.02)
                await program.close_stdin()
                said = b"".join([content async for _, content in program.output()])
                assert said.split() == b" ".join(b"got %d" % number for number in range(20)).split()

            async def files() -> None:
                for _ in range(2):
                    await sandbox.write("big", big)
                    assert await sandbox.read("big", max_bytes=1 << 24) == big

            await asyncio.gather(commands(), lines(), echoes(), files())
            cutting.cancel()
            assert await sandbox.read("log") == b"x\n" * 20
            assert line.cuts >= 5, "nothing was cut: this tests nothing"

    run(check, root)


def test_a_line_that_is_lost_before_the_first_word_is_taken_up_again(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with cut_line(live.url) as line, remote(line.url) as backend:
            line.mute_upgrades = 3
            async with backend.acquire(SPEC) as sandbox:
                assert (await sandbox.exec("echo here", timeout_s=5)).stdout == b"here\n"
                assert line.mute_upgrades == 0
                # Also one that stood before.
                line.mute_upgrades = 2
                line.cut()
                assert (await sandbox.exec("echo still", timeout_s=5)).stdout == b"still\n"
                assert line.mute_upgrades == 0

    run(check, root)


def test_a_create_over_a_bad_line_makes_one_sandbox(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with cut_line(live.url) as line, remote(line.url) as backend:
            await backend.connect()
            # A sandbox takes longer than the line lasts, at first.
            cutting = asyncio.create_task(line.cut_every(0.02))
            creating = asyncio.create_task(backend.acquire(SPEC).__aenter__())
            await asyncio.sleep(0.3)
            cutting.cancel()
            await creating
            assert live.pool.stats.made == 1 and line.cuts >= 2

    run(check, root)


def test_a_line_that_stays_down_is_an_error_of_the_infrastructure(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with cut_line(live.url) as line:
            backend = RemoteBackend(line.url, ALICE, patience_s=1.0)
            async with backend.acquire(SPEC) as sandbox:
                waiting = asyncio.create_task(sandbox.exec("sleep 30", timeout_s=TIMEOUT_S))
                await asyncio.sleep(0.2)
                line.is_down = True
                line.cut()
                began = time.monotonic()
                with pytest.raises(SandboxError, match="no connection to"):
                    await waiting
                assert 0.5 < time.monotonic() - began < 10
                line.is_down = False
            await backend.stop()

    run(check, root)


def test_a_command_is_not_given_up_while_its_line_may_come_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody hears of its end in time, which is no silence of the agent's."""
    monkeypatch.setattr("upspiral.sandbox.connected.GRACE_S", 0.5)

    async def check(live: LiveServer) -> None:
        async with cut_line(live.url) as line, remote(line.url) as backend, backend.acquire(SPEC) as sandbox:
            program = await sandbox.spawn("cat")
            waiting = asyncio.create_task(sandbox.exec("echo x >> log; sleep 0.5; cat log", timeout_s=1.0))
            await asyncio.sleep(0.2)
            line.is_down = True
            line.cut()
            await asyncio.sleep(2.5)
            assert not waiting.done()
            line.is_down = False
            assert (await waiting).stdout == b"x\n"
            await program.write(b"still here")
            await program.close_stdin()
            assert [content async for _, content in program.output()] == [b"still here"]

    run(check, root)


def test_servers_wait_longer_than_clients_try_to_come_back() -> None:
    absent_s = back_within_s(PATIENCE_S)
    assert absent_s < RETURN_S and HEARTBEAT_S / _BEATS + absent_s < HEARTBEAT_S
    with pytest.raises(ConfigError, match="patience_s = 100 is longer than servers keep a line"):
        RemoteBackend("http://localhost:1", ALICE, patience_s=100.0)


def test_heartbeats_do_not_wait_for_connections_that_sandboxes_keep() -> None:
    async def play() -> None:
        async with remote("http://localhost:1") as backend:
            connector = backend._api.session.connector
            assert connector is not None and connector.limit == 0

    asyncio.run(play())


def test_a_backend_whose_server_is_gone_stops_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upspiral.sandbox.remote.backend._FAREWELL_S", 0.5)

    async def play() -> None:
        async with live_server(FakeBackend()) as live, cut_line(live.url) as line:
            backend = RemoteBackend(line.url, ALICE, patience_s=0.5)
            async with backend.acquire(SPEC) as sandbox:
                for _ in range(5):
                    await sandbox.snapshot()
                line.is_down = True
                line.cut()
                async with asyncio.timeout(5):
                    await backend.stop()

    asyncio.run(play())


def test_who_waits_for_a_backend_that_is_stopped_is_told_so() -> None:
    """And what is told is no error of a library: a rollout may be given up for it, and nothing else."""

    async def play() -> None:
        async with live_server(FakeBackend()) as live, cut_line(live.url) as line:
            backend = await RemoteBackend(line.url, ALICE).connect()
            line.is_down = True
            line.cut()
            waiting = asyncio.create_task(backend.acquire(SPEC).__aenter__())
            await asyncio.sleep(0.3)
            assert not waiting.done()
            async with asyncio.timeout(10):
                await backend.stop()
                with pytest.raises(SandboxError, match="was closed"):
                    await waiting

    asyncio.run(play())


def test_paths_that_are_no_text_are_told_as_removed() -> None:
    async def play() -> None:
        fake = FakeBackend()
        async with live_server(fake) as live, remote(live.url) as backend, backend.acquire(SPEC) as sandbox:
            (inner,) = fake.sandboxes

            async def diff() -> Diff:
                return Diff(b"", ["/work/\udcff"])

            inner.diff = diff  # type: ignore[method-assign]
            assert (await sandbox.diff()).removed == ["/work/\udcff"]

    asyncio.run(play())


def test_what_is_no_server_of_sandboxes_is_told_as_that_and_a_proxy_is_asked_again() -> None:
    answers: list[tuple[str, bytes]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        status, body = answers.pop(0)
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async def play() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with remote(f"http://127.0.0.1:{port}") as backend:
                for body in (b"<html>", b'{"hello": 1}'):
                    answers.append(("200 OK", body))
                    with pytest.raises(SandboxError, match="is it the right address"):
                        await backend.list_sandboxes()
                answers.append(("404 Not Found", b"<html>"))
                with pytest.raises(SandboxError, match="is it the right address"):
                    await backend.list_sandboxes()
                answers.extend(
                    [("502 Bad Gateway", b"<html>"), ("503 Unavailable", b""), ("200 OK", b'{"sandboxes": []}')]
                )
                assert await backend.list_sandboxes() == []
        async with remote("http://") as nowhere:
            with pytest.raises(SandboxError, match="is it the right address"):
                await nowhere.connect()

    asyncio.run(play())


def test_a_cancelled_command_is_killed_inside(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with remote(live.url) as backend, backend.acquire(SPEC) as sandbox:
            running = asyncio.create_task(sandbox.exec("echo $$ > pid; exec sleep 1000", timeout_s=2000))
            await asyncio.sleep(0.5)
            pid = int(await sandbox.read("pid"))
            assert _lives(pid)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await until(lambda: not _lives(pid), "the command to die")

    run(check, root)


def test_the_same_op_id_runs_once_over_two_clients(root: Path) -> None:
    """Whoever comes back in a new process has no line to take up, but a name for what was asked."""

    async def check(live: LiveServer) -> None:
        async with remote(live.url) as backend, backend.acquire(SPEC) as first, remote(live.url) as other:
            second = await other.attach(first.id)
            command = Command("echo x >> log; sleep 0.3; cat log", op_id="once")
            results = await asyncio.gather(
                first.exec(command, timeout_s=TIMEOUT_S), second.exec(command, timeout_s=TIMEOUT_S)
            )
            assert [each.stdout for each in results] == [b"x\n", b"x\n"]

    run(check, root)


def test_what_the_server_ends_is_gone_for_its_client(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with remote(live.url) as backend, backend.acquire(SPEC) as sandbox, live.client() as alice:
            waiting = asyncio.create_task(sandbox.exec("sleep 30", timeout_s=TIMEOUT_S))
            await asyncio.sleep(0.2)
            async with alice.delete(f"/sandboxes/{sandbox.id}") as response:
                assert response.status == 204
            with pytest.raises(SandboxGoneError):
                await waiting
            with pytest.raises(SandboxGoneError):
                await sandbox.read("a")

    run(check, root)


def test_heartbeats_keep_a_quiet_sandbox_and_their_end_stops_it(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with cut_line(live.url) as line, remote(line.url) as backend, backend.acquire(SPEC) as sandbox:
            await asyncio.sleep(2.5)
            assert (await sandbox.exec("echo here", timeout_s=TIMEOUT_S)).stdout == b"here\n"
            # As if the client's machine had died.
            line.is_down = True
            line.cut()
            await until(lambda: live.pool.stats.live == 0, "the sandbox to stop")
            line.is_down = False
            with pytest.raises(SandboxGoneError):
                await sandbox.exec("true", timeout_s=TIMEOUT_S)

    run(check, root, heartbeat_s=1.0)


def test_errors_have_their_kinds() -> None:
    async def play() -> None:
        async with live_server(FakeBackend(), PoolLimits(live=1, queued=1, wait_s=0.3, warm_max=0)) as live:
            async with remote(live.url, BOB + "x") as stranger:
                with pytest.raises(SandboxError, match="no tenant has this token"):
                    await stranger.connect()
            async with remote(live.url) as backend, remote(live.url, BOB) as other:
                with pytest.raises(SandboxError, match="connect"):
                    _ = backend.capabilities
                assert (await backend.connect()).capabilities == live.pool.capabilities
                with pytest.raises(CapabilityError, match="mounts"):
                    await backend.acquire(SandboxSpec(mounts={"/etc": "/opt/x"})).__aenter__()
                async with backend.acquire(SPEC) as sandbox:
                    with pytest.raises(SandboxBusyError) as busy:
                        await other.acquire(SPEC).__aenter__()
                    assert busy.value.retry_after_s > 0
                    # The fake one has no agent.
                    with pytest.raises(CapabilityError, match=CAPABLE_OF_NOTHING):
                        await sandbox.exec("true", timeout_s=TIMEOUT_S)

    asyncio.run(play())
    with pytest.raises(ConfigError, match="http://"):
        RemoteBackend("localhost:80", ALICE)


def header(received: int = 0) -> bytes:
    return received.to_bytes(8, "big")


def opening(number: int = 1, body: bytes = b'{"do": "list", "path": "/work"}') -> bytes:
    return frames.frame(frames.OPEN, number, body)


HOSTILE = {
    "a message that is too short": b"123",
    "bytes that were never sent": header(10**9),
    "settings": header() + frames.frame(frames.SETTINGS, 0, b"{}"),
    "a result": header() + frames.frame(frames.RESULT, 1, b"{}"),
    "something that was started": header() + frames.frame(frames.STARTED, 1, b"{}"),
    "a frame without end": header() + frames.HEADER.pack(1 << 30, 1, frames.OPEN),
    "a kind that there is not": header() + frames.frame(200, 1, b""),
    "a number of the agent's": header() + opening(frames.INSIDE + 1),
    "an opening that is no JSON": header() + opening(body=b"{"),
    "an opening that is a list": header() + opening(body=b"[]"),
    "an opening that is too deep": header() + opening(body=b"[" * 100_000),
    "the same number twice": header() + 2 * opening(body=b'{"do": "shell", "env": {}, "cwd": "/work"}'),
    "an ACK that is no number": header() + opening() + frames.frame(frames.ACK, 1, b"1"),
    "an ACK of what was never sent": header() + opening() + frames.frame(frames.ACK, 1, b"\xff" * 4),
}


async def knock(live: LiveServer, sandbox_id: str, messages: list[bytes], session: str) -> int | None:
    """Says something impolite, and returns how the server closed."""
    async with live.client() as client:
        path = f"/sandboxes/{sandbox_id}/frames"
        async with client.ws_connect(path, params={"session": session}) as websocket:
            await websocket.receive(timeout=TIMEOUT_S)
            for message in messages:
                await websocket.send_bytes(message)
            async for _ in websocket:
                pass
            return websocket.close_code


def test_hostile_frames_end_their_line_and_nothing_else(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with (
            remote(live.url) as backend,
            backend.acquire(SPEC) as sandbox,
            remote(live.url, BOB) as other,
            other.acquire(SPEC) as neighbour,
        ):
            for number, (what, message) in enumerate(HOSTILE.items()):
                assert await knock(live, sandbox.id, [message], f"session-{number}") == MISBEHAVED, what
                # A line that was ended stays so.
                with pytest.raises(aiohttp.WSServerHandshakeError, match="410"):
                    await knock(live, sandbox.id, [], f"session-{number}")
            for each in (sandbox, neighbour):
                assert (await each.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"
            # What the agent cannot bear breaks this sandbox, and no other one.
            bad = header() + opening(body=b'{"do": "exec"}') + frames.frame(frames.END, 1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(knock(live, sandbox.id, [bad], "session-bad"), 1)
            with pytest.raises(SandboxError):
                await sandbox.exec("true", timeout_s=TIMEOUT_S)
            assert (await neighbour.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

    run(check, root)


def test_too_many_operations_are_refused_one_by_one(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with remote(live.url) as backend, backend.acquire(SPEC) as sandbox, live.client() as client:
            path = f"/sandboxes/{sandbox.id}/frames?session=session-many"
            async with client.ws_connect(path) as websocket:
                # Commands whose scripts never end.
                waiting = b"".join(opening(number, b'{"do": "exec"}') for number in range(1, MOST_OPERATIONS + 7))
                await websocket.send_bytes(header() + waiting)
                decoder, results = frames.Decoder(), list[bytes]()
                while len(results) < 6:
                    message = await websocket.receive_bytes(timeout=TIMEOUT_S)
                    results += [body for kind, _, body in decoder.feed(message[8:]) if kind == frames.RESULT]
                assert all(b"1024 operations are under way" in result for result in results)
            assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

    run(check, root)


def test_a_client_that_does_not_read_loses_its_line(root: Path) -> None:
    async def check(live: LiveServer) -> None:
        async with remote(live.url) as backend, backend.acquire(SPEC) as sandbox, live.client() as client:
            await sandbox.write("big", bytes(1 << 20))
            path = f"/sandboxes/{sandbox.id}/frames?session=session-deaf"
            reading = b'{"do": "read", "path": "/work/big", "max_bytes": 1048576}'
            asked = [opening(number, reading) + frames.frame(frames.END, number) for number in range(1, 200)]
            async with client.ws_connect(path) as deaf:
                await deaf.send_bytes(header() + b"".join(asked))
                # Not a word of confirmation, whatever comes.
                async with asyncio.timeout(TIMEOUT_S):
                    async for _ in deaf:
                        pass
                assert deaf.close_code == MISBEHAVED
            assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

    run(check, root)


@settings(max_examples=10, deadline=None)
@given(noise=st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_leave_the_server_standing(noise: list[bytes]) -> None:
    async def check(live: LiveServer) -> None:
        async with remote(live.url) as backend, backend.acquire(SPEC) as sandbox:
            messages = [header() + each for each in noise]
            knocking = asyncio.create_task(knock(live, sandbox.id, messages, "session-noise"))
            await asyncio.wait([knocking], timeout=0.3)
            knocking.cancel()
            async with live.client() as client, client.get("/health") as response:
                assert response.status == 200

    with open_folder() as root:
        run(check, root)


def test_snapshots_forks_and_what_survives_a_restore() -> None:
    async def check(live: LiveServer) -> None:
        spec = SandboxSpec(files={"a": b"first"})
        async with remote(live.url) as backend, backend.acquire(spec) as sandbox:
            snapshot = await sandbox.snapshot()
            shell = await sandbox.shell()
            await shell.run("mkdir -p folder; cd folder; X=5", timeout_s=TIMEOUT_S)
            forks = await sandbox.fork(2)
            for fork in forks:
                again = await fork.shell()
                assert again.restored == "replayed"
                assert (await again.run("echo $X $PWD", timeout_s=TIMEOUT_S)).stdout == b"5 /work/folder\n"
                assert (await fork.shell()).restored == "new"
                await fork.write("a", b"forked")
            assert await sandbox.read("a") == b"first"
            diff = await sandbox.diff()
            assert b"folder" in diff.archive
            await sandbox.write("a", b"later")
            await sandbox.restore(snapshot)
            # Another agent, and the line goes on; what ran is gone.
            assert await sandbox.read("a") == b"first"
            with pytest.raises(SandboxError):
                await shell.run("echo $X", timeout_s=TIMEOUT_S)
            assert live.pool.stats.live == 3
            await forks[0].stop()
            async with backend.acquire(SandboxSpec(image=snapshot)) as other:
                assert await other.read("a") == b"first"
            await backend.drop(snapshot)
            with pytest.raises(SandboxGoneError, match="no snapshot"):
                await backend.acquire(SandboxSpec(image=snapshot)).__aenter__()

    async def play() -> None:
        with open_folder() as root:
            backend = NamespaceBackend(root)
            async with live_server(backend) as live:
                await asyncio.wait_for(check(live), 2 * TIMEOUT_S)

    _try_backend("namespace")
    asyncio.run(play())


@pytest.mark.parametrize("backend_name", ["process", "namespace"])
def test_nothing_is_left_when_the_server_is_killed(backend_name: str) -> None:
    mark = f"1000.{os.getpid()}{time.monotonic_ns()}"

    async def check(server: subprocess.Popen[str], url: str) -> None:
        backend = RemoteBackend(url, ALICE, patience_s=1.0)
        async with backend.acquire(SPEC) as one, backend.acquire(SPEC) as two:
            for sandbox in (one, two):
                await sandbox.exec(f"sleep {mark} & setsid sleep {mark} &", timeout_s=TIMEOUT_S)
            await until(lambda: len(_running(mark)) == 4, "the programs to run")
            server.kill()
            await until(lambda: not _running(mark), "everything in the sandboxes to die")
            with pytest.raises(SandboxError):
                await one.exec("true", timeout_s=TIMEOUT_S)
        await backend.stop()

    _try_backend(backend_name)
    with server_process("--backend", backend_name) as (server, url):
        asyncio.run(asyncio.wait_for(check(server, url), 2 * TIMEOUT_S))
    assert run_command(["sandbox", "gc"]) == 0


def test_a_server_that_is_told_to_stop_waits_for_those_who_use_it() -> None:
    async def check(server: subprocess.Popen[str], url: str) -> None:
        async with remote(url) as backend:
            async with backend.acquire(SPEC) as sandbox:
                server.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.5)
                assert (await sandbox.exec("echo still", timeout_s=TIMEOUT_S)).stdout == b"still\n"
                with pytest.raises(SandboxBusyError, match="drained"):
                    await backend.acquire(SPEC).__aenter__()
                assert server.poll() is None
            await until(lambda: server.poll() is not None, "the server to end")
            assert server.returncode == 0

    with server_process("--backend", "process") as (server, url):
        asyncio.run(asyncio.wait_for(check(server, url), 2 * TIMEOUT_S))


def test_a_second_signal_ends_what_is_in_use() -> None:
    async def check(server: subprocess.Popen[str], url: str) -> None:
        backend = RemoteBackend(url, ALICE, patience_s=1.0)
        async with backend.acquire(SPEC) as sandbox:
            for _ in range(2):
                server.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.5)
            await until(lambda: server.poll() is not None, "the server to end")
            assert server.returncode == 0
            with pytest.raises(SandboxError):
                await sandbox.exec("true", timeout_s=TIMEOUT_S)
        await backend.stop()

    with server_process("--backend", "process") as (server, url):
        asyncio.run(asyncio.wait_for(check(server, url), 2 * TIMEOUT_S))


def _try_backend(name: str) -> None:
    """Skips the test where this machine cannot have it."""

    async def play() -> None:
        try:
            await make_backend(name).stop()
        except SandboxError as error:
            pytest.skip(f"no {name} backend here: {error}")

    asyncio.run(play())


def _running(mark: str) -> list[int]:
    """Processes with a text in their command line, also those of other pid namespaces."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def _lives(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
