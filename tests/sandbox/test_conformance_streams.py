"""Every backend: programs that run meanwhile, shells that stay, and ports."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.sandbox.conformance import TIMEOUT_S, Stage, eventually, output_of
from upspiral.errors import DeadlineError, SandboxGoneError
from upspiral.sandbox.base import ByteStream, Command, Limits, Process, Sandbox, SandboxSpec, Shell

ECHO = (
    "import socket, sys\n"
    "listener = socket.create_server((sys.argv[2] if len(sys.argv) > 2 else '127.0.0.1', int(sys.argv[1])), family="
    "socket.AF_INET6 if len(sys.argv) > 2 else socket.AF_INET)\n"
    "print('ready', flush=True)\n"
    "while True:\n"
    "    caller, _ = listener.accept()\n"
    "    while chunk := caller.recv(65536):\n"
    "        caller.sendall(chunk.upper())\n"
    "    caller.close()\n"
)


async def all_output(process: Process) -> tuple[bytes, bytes]:
    received = {"stdout": bytearray(), "stderr": bytearray()}
    async for name, content in process.output():
        received[name] += content
    return bytes(received["stdout"]), bytes(received["stderr"])


def test_a_program_talks_while_it_runs(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        process = await sandbox.spawn(
            Command("while read line; do echo got $line $X; done; echo end >&2; exit 3", env={"X": "x"})
        )
        output = process.output()
        for word in (b"one", b"two"):
            await process.write(word + b"\n")
            assert await anext(output) == ("stdout", b"got " + word + b" x\n")
        with pytest.raises(DeadlineError):
            await process.wait(timeout_s=0.1)
        await process.close_stdin()
        assert [each async for each in output] == [("stderr", b"end\n")]
        done = await process.wait(timeout_s=TIMEOUT_S)
        assert (done.exit_code, done.stdout, done.timed_out) == (3, b"", False)
        with pytest.raises(BrokenPipeError):
            await process.write(b"x")

    stage.run(check)


def test_a_program_gets_its_stdin(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        process = await sandbox.spawn(Command("wc -c", stdin=b"x" * 3_000_000))
        assert await all_output(process) == (b"3000000\n", b"")
        echo = await sandbox.spawn(Command("cat", stdin=b"x" * 3_000_000))
        assert await all_output(echo) == (b"x" * 3_000_000, b"")
        unread = await sandbox.spawn(Command("exit 3", stdin=b"x" * 3_000_000))
        assert (await unread.wait(timeout_s=TIMEOUT_S)).exit_code == 3
        deaf = await sandbox.spawn("exec 0<&-; echo closed; sleep 1000")
        assert await anext(deaf.output()) == ("stdout", b"closed\n")
        with pytest.raises(BrokenPipeError):
            for _ in range(100):
                await deaf.write(b"x" * 10_000)
                await asyncio.sleep(0.05)
        await deaf.kill()
        assert (await deaf.wait(timeout_s=TIMEOUT_S)).exit_code == 137

    stage.run(check)


def test_a_program_waits_for_who_reads_it_and_nobody_else_does(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        process = await sandbox.spawn("head -c 20M /dev/zero; echo > done")
        await asyncio.sleep(0.5)
        assert (await sandbox.exec("test ! -e done; echo $?", timeout_s=TIMEOUT_S)).stdout == b"0\n"
        stdout, _ = await all_output(process)
        assert len(stdout) == 20 << 20
        assert (await process.wait(timeout_s=TIMEOUT_S)).exit_code == 0

    stage.run(check)


def test_killing_a_program_ends_what_it_started(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        process = await sandbox.spawn("trap 'echo bye; exit 5' TERM; sleep 1000 & setsid sleep 1000 & echo up; wait")
        output = process.output()
        assert await anext(output) == ("stdout", b"up\n")
        await process.kill(15)
        assert [each async for each in output] == [("stdout", b"bye\n")]
        assert (await process.wait(timeout_s=TIMEOUT_S)).exit_code == 5
        hard = await sandbox.spawn("trap '' TERM; sleep 1000 & setsid sleep 1000 & wait")
        await hard.kill()
        assert (await hard.wait(timeout_s=TIMEOUT_S)).exit_code == 137

        async def nothing_runs() -> bool:
            return await output_of(sandbox, "pgrep -u $(id -u) -x sleep || true") == b""

        await eventually(nothing_runs, "what the programs started is gone")

    stage.run(check)


def test_stop_ends_programs(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        process = await sandbox.spawn("sleep 1000")
        await sandbox.stop()
        with pytest.raises(SandboxGoneError):
            await process.wait(timeout_s=TIMEOUT_S)
        with pytest.raises(SandboxGoneError):
            await all_output(process)

    stage.run(check)


def test_a_shell_remembers(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        shell, other = await sandbox.shell(), await sandbox.shell()
        assert shell.restored == "new"

        async def run(command: str) -> tuple[int | None, bytes, bytes]:
            done = await shell.run(command, timeout_s=TIMEOUT_S)
            return done.exit_code, done.stdout, done.stderr

        assert await run("cd a; X='1 2'; f() { echo \"f $1 $X\"; return 4; }; export Y=3") == (0, b"", b"")
        assert await run("f 0") == (4, b"f 0 1 2\n", b"")
        assert (await run("pwd; env | grep ^Y=")) == (0, (await run("pwd"))[1] + b"Y=3\n", b"")
        assert await run("echo err >&2; (exit 7)") == (7, b"", b"err\n")
        assert await run('read x; echo "[$x]"; cat') == (0, b"[]\n", b"")
        assert (await run("if then"))[0] != 0
        assert await run("# " + "x" * 300_000 + "\necho long") == (0, b"long\n", b"")
        assert (await run("history | wc -l; echo !!"))[1].endswith(b"!!\n")
        shown = await run("bash -c 'for fd in {3..300}; do [ -e /proc/$$/fd/$fd ] && echo $fd; done; true'")
        assert set(shown[1].split()) <= {b"255"}
        assert (await other.run("echo $X; pwd", timeout_s=TIMEOUT_S)).stdout.startswith(b"\n")
        await asyncio.gather(*(shell.run(f"echo {number} >> log", timeout_s=TIMEOUT_S) for number in range(10)))
        assert await sandbox.read("a/log") == b"".join(b"%d\n" % number for number in range(10))
        await shell.close()
        await other.close()

        async def nothing_runs() -> bool:
            return await output_of(sandbox, "pgrep -u $(id -u) -x bash | grep -vx $$ || true") == b""

        await eventually(nothing_runs, "the shells are gone")
        assert await sandbox.list_files() == ["a/b", "a/log"]

    stage.run(check, files={"a/b": b""})


@pytest.mark.parametrize(
    "hang", ["sleep 1000; echo not here", "while :; do :; done", "sleep 1000 | cat", "cat /dev/zero"]
)
def test_a_shell_survives_a_deadline(stage: Stage, hang: str) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        shell = await sandbox.shell()
        await shell.run("X=1; sleep 1000 &", timeout_s=TIMEOUT_S)
        done = await shell.run(f"echo begun; {hang}", timeout_s=0.5)
        assert (done.exit_code, done.timed_out, done.stdout[:6]) == (None, True, b"begun\n")
        done = await shell.run("echo $X; kill -0 $! && echo there", timeout_s=TIMEOUT_S)
        assert (done.stdout, done.exit_code) == (b"1\nthere\n", 0), "and so does what an earlier command left"

    stage.run(check, limits=Limits(output_bytes=1000))


@pytest.mark.parametrize(
    "end", ["exit 3", "kill -9 $$", "exec sleep 0.1", "trap '' INT; while :; do :; done", "set -e; false"]
)
def test_a_shell_that_ends_is_followed_by_another(stage: Stage, end: str) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        shell = await sandbox.shell()
        assert (await shell.run("X=1", timeout_s=TIMEOUT_S)).exit_code == 0
        ended = await shell.run(f"echo begun; {end}", timeout_s=1.0)
        assert ended.stdout == b"begun\n"
        assert ended.timed_out == ("while" in end)
        after = await shell.run("echo [$X]", timeout_s=TIMEOUT_S)
        assert (after.stdout, after.exit_code) == (b"[]\n", 0)
        assert b"this is a new one" in after.stderr
        assert b"new one" not in (await shell.run("echo again", timeout_s=TIMEOUT_S)).stderr

    stage.run(check)


def test_a_fork_has_the_shells_of_its_parent(stage: Stage) -> None:
    stage.needs("commands", "snapshot", "shell_fork")

    async def said(shell: Shell, command: str) -> bytes:
        return (await shell.run(command, timeout_s=TIMEOUT_S)).stdout

    async def check(sandbox: Sandbox) -> None:
        first, second, closed = [await sandbox.shell() for _ in range(3)]
        await closed.close()
        await said(first, "X=first; mkdir -p a; cd a; f() { echo $X in ${PWD##*/}; }")
        await said(second, "X=second")
        (fork,) = await sandbox.fork()
        await said(first, "X=changed")
        taken = await fork.shell()
        assert (taken.restored, await said(taken, "f")) == ("replayed", b"first in a\n")
        await said(taken, "X=forked")
        (grandchild,) = await fork.fork()
        shells = [await grandchild.shell() for _ in range(3)]
        assert [shell.restored for shell in shells] == ["replayed", "replayed", "new"]
        assert [await said(shell, "echo $X") for shell in shells] == [b"forked\n", b"second\n", b"\n"]
        for each in (fork, grandchild):
            await each.stop()

    stage.run(check)


def test_a_shell_whose_replay_is_cancelled_is_replayed_to_the_next_who_asks(stage: Stage) -> None:
    stage.needs("commands", "snapshot", "shell_fork")

    async def check(sandbox: Sandbox) -> None:
        await (await sandbox.shell()).run("X=1; sleep 0.5", timeout_s=TIMEOUT_S)
        (fork,) = await sandbox.fork()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await fork.shell()
        again = await fork.shell()
        assert again.restored == "replayed"
        assert (await again.run("echo $X", timeout_s=TIMEOUT_S)).stdout == b"1\n"
        await fork.stop()

    stage.run(check)


async def _exchange(stream: ByteStream, content: bytes) -> bytes:
    received = b""
    await stream.write(content)
    while len(received) < len(content):
        chunk = await stream.read()
        assert chunk, "the stream ended early"
        received += chunk
    return received


def test_connect_reaches_a_port_inside(stage: Stage) -> None:
    stage.needs("commands", "connect")

    async def check(sandbox: Sandbox) -> None:
        for port, address in ((8431, ""), (8432, "::1")):
            server = await sandbox.spawn(f"python3 echo.py {port} {address}")
            output = server.output()
            kind, said = await anext(output)
            if kind == "stderr":
                pytest.skip(f"there is no Python or no {address or 'IPv4'} inside: {said.decode()[-100:]}")
            assert said == b"ready\n"
            for _ in range(3):
                stream = await sandbox.connect(port)
                assert await _exchange(stream, b"hello") == b"HELLO"
                assert await _exchange(stream, b"x" * 100_000) == b"X" * 100_000
                await stream.close()
            await server.kill()
        with pytest.raises(ConnectionRefusedError):
            await sandbox.connect(8433)

    stage.run(check, files={"echo.py": ECHO.encode()})


@contextlib.asynccontextmanager
async def host_service() -> AsyncIterator[str]:
    """A unix socket on the host that answers in capitals."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65536):
            writer.write(chunk.upper())
            await writer.drain()
        writer.close()

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "service.sock"))
        server = await asyncio.start_unix_server(serve, path)
        try:
            yield path
        finally:
            server.close()


TALK = "exec 3<>/dev/tcp/127.0.0.1/{port}; echo hello >&3; head -n 1 <&3"


def test_forwarded_ports_reach_the_host(stage: Stage) -> None:
    stage.needs("commands", "forward_sockets")

    async def check() -> None:
        async with host_service() as path:
            backend = stage.entry.make(stage.root)
            try:
                with socket.socket(socket.AF_UNIX) as closed:
                    closed.bind(f"{path}.gone")
                spec = SandboxSpec(forward_sockets={8123: path, 8124: path, 8126: f"{path}.gone"})
                async with backend.acquire(spec) as sandbox:
                    done = await sandbox.exec(f"{TALK.format(port=8123)}; exit 7", timeout_s=TIMEOUT_S)
                    assert (done.stdout, done.exit_code) == (b"HELLO\n", 7), done
                    both = f"({TALK.format(port=8123)}) & ({TALK.format(port=8124)}); wait"
                    assert await output_of(sandbox, both) == b"HELLO\nHELLO\n"
                    refused = await sandbox.exec(TALK.format(port=8125), timeout_s=TIMEOUT_S)
                    assert b"refused" in refused.stderr
                    flood = "head -c 5M /dev/zero | tr '\\0' x >&3 & head -c 5M <&3 | wc -c"
                    assert await output_of(sandbox, f"exec 3<>/dev/tcp/127.0.0.1/8123; {flood}") == b"5242880\n"
                    silent = await sandbox.exec(TALK.format(port=8126), timeout_s=TIMEOUT_S)
                    assert silent.stdout == b"", "nobody is at home behind this one"
            finally:
                await backend.stop()

    asyncio.run(asyncio.wait_for(check(), 120))
