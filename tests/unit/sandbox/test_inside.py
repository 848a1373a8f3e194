"""The agent as a process of its own, without a backend around it: sockets, ports, names of operations, and its end."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.sandbox.conformance import SLEEP, eventually, sleepers
from upspiral.errors import SandboxError
from upspiral.sandbox import inside
from upspiral.sandbox.base import Command, Limits, SandboxSpec
from upspiral.sandbox.connected import ConnectedSandbox, settings_for
from upspiral.sandbox.connection import Connection
from upspiral.sandbox.inside.settings import Confinement, Settings

FOLDER = next(iter(inside.__path__))
TIMEOUT_S = 60.0


def settings_in(folder: Path, **changes: object) -> Settings:
    plain = settings_for(SandboxSpec(), str(folder)).to_json()
    return Settings.from_json({**plain, "rlimits": {}, "is_init": True, **changes})


def start_agent(
    *arguments: str, program: str = FOLDER, python: str = sys.executable, pass_fds: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    command = [python, "-I", "-S", program, *arguments]
    return subprocess.Popen(command, pass_fds=pass_fds, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env={})


@contextlib.asynccontextmanager
async def agent(
    settings: Settings, forward: dict[int, str] | None = None, program: str = FOLDER, python: str = sys.executable
) -> AsyncIterator[tuple[ConnectedSandbox, subprocess.Popen[bytes]]]:
    """A sandbox around a plain process that is connected by a socket pair."""
    ours, theirs = socket.socketpair()
    process = start_agent(str(theirs.fileno()), program=program, python=python, pass_fds=(theirs.fileno(),))
    theirs.close()
    connection = await Connection.over(ours, settings, forward)
    sandbox = ConnectedSandbox("test", connection, Limits())
    try:
        yield sandbox, process
    finally:
        await sandbox.stop()
        _, complaint = await asyncio.to_thread(process.communicate, timeout=TIMEOUT_S)
        assert complaint == b"", complaint.decode()


def run(check: Callable[[], Awaitable[None]]) -> None:
    async def body() -> None:
        await asyncio.wait_for(check(), 120)

    asyncio.run(body())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_it_stands_alone(tmp_path: Path) -> None:
    """As a zip, in a container that has nothing but Python."""
    archive = tmp_path / "agent.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in Path(FOLDER).glob("*.py"):
            zipped.write(path, path.name)

    async def check() -> None:
        async with agent(settings_in(tmp_path), program=str(archive)) as (sandbox, _):
            assert (await sandbox.exec("pwd", timeout_s=TIMEOUT_S)).stdout == f"{tmp_path}\n".encode()

    run(check)


def test_it_imports_the_standard_library_and_itself() -> None:
    for path in Path(FOLDER).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= sys.stdlib_module_names, path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.module or "").split(".")[0] in sys.stdlib_module_names, path


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.12", "3.13", "3.14"])
def test_it_runs_on_other_pythons(version: str, tmp_path: Path) -> None:
    """As a container may have one."""
    program = shutil.which(f"python{version}")
    if not program or subprocess.run([program, "-c", ""], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"there is no Python {version} here")

    async def check() -> None:
        async with agent(settings_in(tmp_path), python=program) as (sandbox, _):
            assert (await sandbox.exec("cat; exit 3", timeout_s=TIMEOUT_S)).exit_code == 3
            assert (await (await sandbox.shell()).run("echo hi", timeout_s=TIMEOUT_S)).stdout == b"hi\n"
            await sandbox.write("a/b", b"x")
            await sandbox.upload(await sandbox.download("a"), "c")
            assert await sandbox.list_files() == ["a/b", "c/b"]

    run(check)


def test_the_end_of_its_socket_ends_it_and_all_that_it_started(tmp_path: Path) -> None:
    async def check() -> None:
        async with agent(settings_in(tmp_path)) as (sandbox, process):
            await sandbox.exec(f"{SLEEP} & setsid {SLEEP} & (setsid setsid {SLEEP} &) ; true", timeout_s=TIMEOUT_S)
            await sandbox.spawn(SLEEP)
            await (await sandbox.shell()).run(f"{SLEEP} &", timeout_s=TIMEOUT_S)

            async def all_sleep() -> bool:
                return len(sleepers()) == 5

            await eventually(all_sleep, "all five have begun")
            await sandbox.stop()
            assert await asyncio.to_thread(process.wait, TIMEOUT_S) == 0
            assert sleepers() == []

    run(check)


def test_a_dead_agent_is_a_broken_sandbox(tmp_path: Path) -> None:
    async def check() -> None:
        async with agent(settings_in(tmp_path)) as (sandbox, process):
            running = asyncio.create_task(sandbox.exec("sleep 5", timeout_s=TIMEOUT_S))
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(SandboxError, match="agent has ended"):
                await running

    run(check)


def test_it_holds_few_descriptors(tmp_path: Path) -> None:
    """Its socket, the epoll, a pipe that wakes it, and nothing of the commands that have ended."""

    async def check() -> None:
        async with agent(settings_in(tmp_path)) as (sandbox, process):
            await sandbox.exec("true", timeout_s=TIMEOUT_S)
            before = set(os.listdir(f"/proc/{process.pid}/fd"))
            assert len(before) <= 7
            for _ in range(20):
                await sandbox.exec(Command("cat", stdin=b"x"), timeout_s=TIMEOUT_S)
                await sandbox.exec("sleep 100", timeout_s=0.01)
            await sandbox.write("a", b"x")
            await sandbox.read("a")
            await sandbox.download()
            shell = await sandbox.shell()
            await shell.run("exit", timeout_s=TIMEOUT_S)
            await shell.run("echo", timeout_s=TIMEOUT_S)
            await shell.close()
            with contextlib.suppress(FileNotFoundError):
                await sandbox.read("gone")

            async def as_before() -> bool:
                return set(os.listdir(f"/proc/{process.pid}/fd")) == before

            await eventually(as_before, "only those are open that were")

    run(check)


@contextlib.asynccontextmanager
async def service(folder: Path) -> AsyncIterator[str]:
    """A unix socket on the host that answers in capitals."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65536):
            writer.write(chunk.upper())
            await writer.drain()
        writer.close()

    path = str(folder / "service.sock")
    server = await asyncio.start_unix_server(serve, path)
    try:
        yield path
    finally:
        server.close()


def test_forwarded_ports_lead_to_the_host(tmp_path: Path) -> None:
    async def check() -> None:
        port, dead = free_port(), free_port()
        settings = settings_in(tmp_path, forward_ports=[port, dead])
        async with service(tmp_path) as path, agent(settings, {port: path, dead: f"{path}.gone"}) as (sandbox, _):
            talk = f"exec 3<>/dev/tcp/127.0.0.1/{port}; echo hello >&3; head -n 1 <&3"
            assert (await sandbox.exec(f"{talk}; exit 7", timeout_s=TIMEOUT_S)).stdout == b"HELLO\n"
            many = await asyncio.gather(*(sandbox.exec(talk, timeout_s=TIMEOUT_S) for _ in range(20)))
            assert [done.stdout for done in many] == [b"HELLO\n"] * 20
            flood = f"exec 3<>/dev/tcp/127.0.0.1/{port}; head -c 5M /dev/zero | tr '\\0' x >&3 & head -c 5M <&3 | wc -c"
            assert (await sandbox.exec(flood, timeout_s=TIMEOUT_S)).stdout == b"5242880\n"
            half = (
                f"import socket; s = socket.create_connection(('127.0.0.1', {port})); s.sendall(b'x' * 300000); "
                "s.shutdown(socket.SHUT_WR); print(sum(len(c) for c in iter(lambda: s.recv(4096), b'')))"
            )
            assert (await sandbox.exec(f'{sys.executable} -c "{half}"', timeout_s=TIMEOUT_S)).stdout == b"300000\n"
            nobody = await sandbox.exec(talk.replace(str(port), str(dead)), timeout_s=TIMEOUT_S)
            assert nobody.stdout == b""
            slow = f"exec 3<>/dev/tcp/127.0.0.1/{port}; head -c 3M /dev/zero >&3; sleep 1000"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await sandbox.exec(slow, timeout_s=TIMEOUT_S)
            assert (await sandbox.exec(talk, timeout_s=TIMEOUT_S)).stdout == b"HELLO\n"

    run(check)


def test_a_port_that_is_taken_is_said_at_the_start(tmp_path: Path) -> None:
    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            settings = settings_in(tmp_path, forward_ports=[listener.getsockname()[1]])
            ours, theirs = socket.socketpair()
            process = start_agent(str(theirs.fileno()), pass_fds=(theirs.fileno(),))
            theirs.close()
            connection = await Connection.over(ours, settings)
            with pytest.raises(SandboxError, match="agent has ended"):
                await connection.ping(timeout_s=TIMEOUT_S)
            _, complaint = await asyncio.to_thread(process.communicate, timeout=TIMEOUT_S)
            assert b"Address already in use" in complaint

    run(check)


async def connect(path: Path, settings: Settings) -> ConnectedSandbox:
    async def there() -> bool:
        return path.exists()

    await eventually(there, "the agent listens")
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(path))
    return ConnectedSandbox("test", await Connection.over(connected, settings), Limits())


def test_a_named_command_survives_a_lost_connection(tmp_path: Path) -> None:
    async def check() -> None:
        path, settings = tmp_path / "agent.sock", settings_in(tmp_path, orphan_s=TIMEOUT_S)
        process = start_agent(str(path))
        try:
            first = await connect(path, settings)
            named = Command("echo once >> log; sleep 1; echo done", op_id="n1")
            running = [asyncio.create_task(first.exec(named, timeout_s=TIMEOUT_S)) for _ in range(2)]
            nameless = asyncio.create_task(first.exec(SLEEP, timeout_s=TIMEOUT_S))
            await asyncio.sleep(0.3)
            await first.stop()
            for each in (*running, nameless):
                with pytest.raises(SandboxError):
                    await each
            second = await connect(path, settings)
            assert (await second.exec(named, timeout_s=TIMEOUT_S)).stdout == b"done\n"
            third = await connect(path, settings)
            assert (await third.exec(named, timeout_s=TIMEOUT_S)).stdout == b"done\n"
            assert await third.read("log") == b"once\n"
            assert sleepers() == []
            with pytest.raises(SandboxError):
                await second.read("log")
            await second.stop()
            await third.stop()
        finally:
            process.kill()
            process.communicate(timeout=TIMEOUT_S)

    run(check)


def test_an_agent_that_nobody_wants_ends(tmp_path: Path) -> None:
    async def check() -> None:
        path, settings = tmp_path / "agent.sock", settings_in(tmp_path, orphan_s=0.5)
        process = start_agent(str(path))
        first = await connect(path, settings)
        await first.exec(f"setsid {SLEEP} &", timeout_s=TIMEOUT_S)
        await first.stop()
        second = await connect(path, settings)
        await asyncio.sleep(1.0)
        assert (await second.exec("echo here", timeout_s=TIMEOUT_S)).stdout == b"here\n"
        await second.stop()
        _, complaint = await asyncio.to_thread(process.communicate, timeout=TIMEOUT_S)
        assert (process.returncode, complaint) == (0, b"")
        assert sleepers() == []

    run(check)


def test_cancelling_one_of_those_who_wait_for_a_named_command_leaves_it_to_the_others(tmp_path: Path) -> None:
    async def check() -> None:
        async with agent(settings_in(tmp_path)) as (sandbox, _):
            named = Command("sleep 0.5; echo done", op_id="n1")
            one, two = (asyncio.create_task(sandbox.exec(named, timeout_s=TIMEOUT_S)) for _ in range(2))
            await asyncio.sleep(0.2)
            one.cancel()
            assert (await two).stdout == b"done\n"
            with pytest.raises(asyncio.CancelledError):
                await one
            hang = Command(f"echo x >> log; {SLEEP}", op_id="n2")
            alone = asyncio.create_task(sandbox.exec(hang, timeout_s=TIMEOUT_S))
            await asyncio.sleep(0.2)
            alone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await alone

            async def is_over() -> bool:
                return sleepers() == []

            await eventually(is_over, "what was killed is gone, for which the kernel takes its moment")

    run(check)


def test_many_results_are_remembered_but_not_all(tmp_path: Path) -> None:
    async def check() -> None:
        async with agent(settings_in(tmp_path)) as (sandbox, _):
            for number in range(270):
                command = Command(f"echo {number} >> log", op_id=f"n{number}")
                assert (await sandbox.exec(command, timeout_s=TIMEOUT_S)).exit_code == 0
            await sandbox.exec(Command("echo again >> log", op_id="n269"), timeout_s=TIMEOUT_S)
            assert (await sandbox.read("log")).endswith(b"269\n")
            await sandbox.exec(Command("echo again >> log", op_id="n0"), timeout_s=TIMEOUT_S)
            assert (await sandbox.read("log")).endswith(b"again\n")

    run(check)


def test_an_out_of_memory_kill_is_told(tmp_path: Path) -> None:
    """By the count in a file like a control group's, which the agent gets as a descriptor."""
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 0\noom_kill 3\noom_group_kill 0\n")

    async def check() -> None:
        descriptor = os.open(events, os.O_RDONLY)
        ours, theirs = socket.socketpair()
        process = start_agent(str(theirs.fileno()), pass_fds=(theirs.fileno(), descriptor))
        theirs.close()
        sandbox = ConnectedSandbox("t", await Connection.over(ours, settings_in(tmp_path, oom_fd=descriptor)), Limits())
        os.close(descriptor)
        assert not (await sandbox.exec("true", timeout_s=TIMEOUT_S)).oom
        done = await sandbox.exec(f"echo 'oom_kill 4' > {events}; kill -9 $$", timeout_s=TIMEOUT_S)
        assert (done.oom, done.exit_code) == (True, 137)
        assert not (await sandbox.exec("true", timeout_s=TIMEOUT_S)).oom
        await sandbox.stop()
        await asyncio.to_thread(process.communicate, timeout=TIMEOUT_S)

    run(check)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
def test_commands_and_files_are_another_user_s(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    os.chown(tmp_path, 61234, 61234)

    async def check() -> None:
        async with agent(settings_in(tmp_path, uid=61234, gid=61235, groups=[61236])) as (sandbox, process):
            await sandbox.write("a/b", b"x")
            await sandbox.upload(await sandbox.download("a"), "c")
            done = await sandbox.exec("id -u; id -G; stat -c '%u %g' a a/b c c/b; cat /etc/shadow", timeout_s=TIMEOUT_S)
            assert done.stdout.split(b"\n")[:2] == [b"61234", b"61235 61236"]
            assert done.stdout.split(b"\n")[2:6] == [b"61234 61235"] * 4
            for attempt in (sandbox.read("/etc/shadow"), sandbox.write("/etc/x", b""), sandbox.download("/root")):
                with pytest.raises(OSError):
                    await attempt
            caught = await sandbox.exec("kill -9 $PPID; cat /proc/$PPID/environ; kill -9 -1", timeout_s=TIMEOUT_S)
            assert caught.stdout == b"" and b"not permitted" in caught.stderr
            killer = await sandbox.spawn(f"while :; do kill -9 {process.pid} && echo killed; done 2>/dev/null")
            for _ in range(100):
                await sandbox.exec("true", timeout_s=TIMEOUT_S)
                await sandbox.write("a/b", b"x")
                await sandbox.read("a/b")
            await killer.kill()
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert "Uid:\t0\t0\t0\t0" in status
            rights = await sandbox.exec("grep -E 'Cap(Prm|Eff|Inh|Amb)' /proc/self/status", timeout_s=TIMEOUT_S)
            assert set(rights.stdout.split()[1::2]) == {b"0" * 16}

    run(check)


def test_a_deadline_may_be_far_away(tmp_path: Path) -> None:
    async def check() -> None:
        async with agent(settings_in(tmp_path)) as (sandbox, _):
            for timeout_s in (1e9, float("inf")):
                assert (await sandbox.exec("sleep 0.1; echo hi", timeout_s=timeout_s)).stdout == b"hi\n"

    run(check)


def test_a_command_that_can_never_start_is_a_result(tmp_path: Path) -> None:
    """Also the first one of a shell, and none of them takes anything along."""

    async def check() -> None:
        async with agent(settings_in(tmp_path, env={"A=B": "x"})) as (sandbox, process):
            done = await sandbox.exec("true", timeout_s=TIMEOUT_S)
            before = len(os.listdir(f"/proc/{process.pid}/fd"))
            shell = await sandbox.shell()
            for each in (done, *[await shell.run("true", timeout_s=TIMEOUT_S) for _ in range(3)]):
                assert each.exit_code == 126 and b"environment" in each.stderr
            await sandbox.write("a", b"x")
            assert len(os.listdir(f"/proc/{process.pid}/fd")) == before

    run(check)


def test_a_status_that_a_command_makes_up_is_one_that_a_shell_can_have(tmp_path: Path) -> None:
    """Bash keeps its own pipes beside a command's, where builtins find them."""

    async def check() -> None:
        async with agent(settings_in(tmp_path)) as (sandbox, _):
            shell = await sandbox.shell()
            forge = f"for n in {{10..30}}; do echo {10**400 + 7} >&$n; done 2>/dev/null; sleep 0.2"
            done = await shell.run(forge, timeout_s=TIMEOUT_S)
            assert done.exit_code == (10**400 + 7) & 0xFF
            await asyncio.sleep(0.5)
            assert (await shell.run("echo on", timeout_s=TIMEOUT_S)).stdout == b"on\n"

    run(check)


def test_a_listener_that_takes_nobody_in_breaks_nothing(tmp_path: Path) -> None:
    listen = (
        "import socket, time\ns = socket.socket()\ns.bind(('127.0.0.1', {}))\ns.listen(0)\n"
        "full = [socket.socket() for _ in range(4)]\nfor each in full:\n    each.setblocking(False)\n"
        "    each.connect_ex(s.getsockname())\nprint('full', flush=True)\ntime.sleep(1000)"
    )

    async def check() -> None:
        async with agent(settings_in(tmp_path)) as (sandbox, _):
            port = free_port()
            server = await sandbox.spawn(f'{sys.executable} -c "{listen.format(port)}"')
            assert await anext(server.output()) == ("stdout", b"full\n")
            with pytest.raises(OSError, match="timed out"):
                await sandbox.connect(port)
            await sandbox.exec("true", timeout_s=TIMEOUT_S)

    run(check)


def test_a_program_that_is_given_up_for_an_error_is_ended(tmp_path: Path) -> None:
    async def check() -> None:
        async with agent(settings_in(tmp_path)) as (sandbox, _):
            script = SLEEP.encode()
            request = {"do": "spawn", "script_bytes": len(script), "env": {}, "cwd": "/work"}
            call = sandbox.connection.call(request, script)
            await call.start()
            call.control(signal=999)
            assert (await call.result()).error == "OSError"

            async def is_over() -> bool:
                return sleepers() == []

            await eventually(is_over, "the program is gone")

    run(check)


LEASE = """
import fcntl, signal, time
signal.signal(signal.SIGIO, signal.SIG_IGN)
held = open("held")
fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
time.sleep(1000)
"""


def test_work_that_commands_hold_up_is_ended(tmp_path: Path) -> None:
    """With a lease the kernel has an opener wait for 45 s, for each file."""
    archive = tmp_path / "agent.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in Path(FOLDER).glob("*.py"):
            zipped.writestr(path.name, path.read_text().replace("_STANDSTILL_S = 20.0", "_STANDSTILL_S = 0.3"))
    work = tmp_path / "work"

    async def check() -> None:
        async with agent(settings_in(work), program=str(archive)) as (sandbox, _):
            await sandbox.write("held", b"x" * 1_000_000)
            holder = await sandbox.spawn(Command(f"exec {sys.executable} -", stdin=LEASE.encode()))
            kind, said = await anext(holder.output())
            if kind == "stderr":
                pytest.skip(f"there are no leases here: {said.decode()[-100:]}")
            with pytest.raises(OSError, match="stood still"):
                await sandbox.download()
            await holder.kill()
            with tarfile.open(fileobj=io.BytesIO(await sandbox.download())) as packed:
                assert packed.getmember("./held").size == 1_000_000
            slow = sandbox.connection.call({"do": "pack", "path": "/work"})
            await asyncio.sleep(1.5)
            while await slow.receive():
                pass
            assert not (await slow.result()).error, "who is slow at this end keeps it waiting for as long as it takes"

    run(check)


def test_settings_travel() -> None:
    there = Settings(env={"A": "b"}, groups=(1, 2), rlimits={"AS": 1}, confinement=Confinement(readable=("/usr",)))
    assert Settings.from_json(there.to_json()) == there
    with pytest.raises(TypeError, match="no_such"):
        Settings.from_json({"no_such": 1})


def test_a_loop_that_is_stopped_before_it_sleeps_does_not_sleep() -> None:
    """As an agent is whose host goes while it has something to say: for an hour it was left over."""
    program = "from upspiral.sandbox.inside.loop import Loop\nloop = Loop(lambda: loop.stop())\nloop.run()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=TIMEOUT_S, check=True)
