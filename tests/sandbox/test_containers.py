"""Docker and Podman, for real: what is theirs alone. The conformance suite has what every backend does."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.small_image import make_small_root
from tests.sandbox import container_engines
from upspiral.errors import CapabilityError, ImageError, SandboxError, SandboxGoneError
from upspiral.sandbox.base import Command, Limits, Sandbox, SandboxSpec, Snapshot
from upspiral.sandbox.container import ContainerBackend
from upspiral.sandbox.owner import Owner

TIMEOUT_S = 60.0
LABEL = "upspiral.owner"
EMPTY = SandboxSpec()
Make = Callable[[Path], ContainerBackend]


@dataclasses.dataclass(frozen=True)
class Place:
    """An engine, and a folder of the backends of one test."""

    name: str
    make: Make
    root: Path

    def says(self, *arguments: str, content: bytes = b"") -> str:
        command = [*container_engines.command_of(self.name), *arguments]
        done = subprocess.run(command, input=content, capture_output=True, timeout=TIMEOUT_S, check=True)
        return done.stdout.decode().strip()

    def run(self, check: Callable[[ContainerBackend], Awaitable[None]]) -> None:
        """Afterwards nothing is left of the backend."""

        async def body() -> None:
            backend = self.make(self.root)
            try:
                await check(backend)
            finally:
                await backend.stop()

        asyncio.run(asyncio.wait_for(body(), 180))
        assert os.listdir(self.root) == []
        assert self.left_of(os.getpid()) == []

    def run_in(self, check: Callable[[Sandbox], Awaitable[None]], spec: SandboxSpec = EMPTY) -> None:
        async def body(backend: ContainerBackend) -> None:
            async with backend.acquire(spec) as sandbox:
                await check(sandbox)

        self.run(body)

    def left_of(self, process: int) -> list[str]:
        """Containers and images that carry the label of a process."""
        containers = self.says("ps", "--all", f"--filter=label={LABEL}", "--format={{.Names}}").split()
        images = self.says("images", f"--filter=label={LABEL}", "--format={{.Repository}}:{{.Tag}}").split()
        return [name for name in containers + images if f"-{process}-" in name]


@pytest.fixture(params=["docker", "podman"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if reason := getattr(container_engines, f"why_no_{request.param}")():
        pytest.skip(f"no {request.param}: {reason}")
    root = Path(tempfile.mkdtemp(prefix="containers-"))
    try:
        yield Place(request.param, getattr(container_engines, f"{request.param}_backend"), root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def output(sandbox: Sandbox, script: str | Command) -> str:
    done = await sandbox.exec(script, timeout_s=TIMEOUT_S)
    assert done.exit_code == 0, done
    return done.stdout.decode()


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true that {what}"
        time.sleep(0.1)


def test_what_commands_are_allowed(place: Place) -> None:
    async def check(sandbox: Sandbox) -> None:
        status = await output(sandbox, "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status")
        fields = dict(re.findall(r"(\w+):\s+(\w+)", status))
        assert int(fields["CapEff"], 16) == 0 and int(fields["CapBnd"], 16) == 0 and fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        seen = await output(sandbox, "id -un; ls /sys/class/net; touch /usr/x /run/upspiral/doorway/x 2>&1 | wc -l")
        assert seen == "agent\nlo\n2\n"
        assert (await sandbox.exec("mount -t tmpfs x /tmp", timeout_s=TIMEOUT_S)).exit_code != 0
        opened = await sandbox.exec(
            "for f in mem environ maps; do : < /proc/1/$f && echo $f; done", timeout_s=TIMEOUT_S
        )
        assert opened.stdout == b"", "whoever can write the agent's memory answers in its name"
        assert (await sandbox.exec("unshare -U true", timeout_s=TIMEOUT_S)).exit_code != 0
        vsock = await sandbox.exec("python3 -c 'import socket; socket.socket(socket.AF_VSOCK)'", timeout_s=TIMEOUT_S)
        assert vsock.exit_code != 0, "it leads to the hypervisor"

    place.run_in(check)


def test_running_out_of_memory_is_told_apart(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def check(sandbox: Sandbox) -> None:
        done = await sandbox.exec("x=$(head -c 300M /dev/zero | tr '\\0' x); echo survived", timeout_s=TIMEOUT_S)
        assert done.oom and done.stdout == b"" and not done.timed_out, done
        done = await sandbox.exec("kill -9 $$", timeout_s=TIMEOUT_S)
        assert not done.oom and done.exit_code == 137

    place.run_in(check, SandboxSpec(limits=Limits(memory_mb=128)))
    assert os.listdir(tmp_path) == [], "Podman would note it where it is run"


def test_cores_are_limited(place: Place) -> None:
    async def check(sandbox: Sandbox) -> None:
        done = await sandbox.exec("timeout 2 bash -c 'while :; do :; done'; true", timeout_s=TIMEOUT_S)
        assert done.cpu_s < 1.2, done

    place.run_in(check, SandboxSpec(limits=Limits(cpus=0.25)))


def test_mounts_are_read_only(place: Place) -> None:
    with tempfile.TemporaryDirectory(prefix="mount, with a comma ") as folder:
        Path(folder, "x").write_text("seen")
        Path(folder).chmod(0o755)

        async def check(sandbox: Sandbox) -> None:
            assert await output(sandbox, "cat /opt/here/x; touch /opt/here/y || echo refused") == "seenrefused\n"

        place.run_in(check, SandboxSpec(mounts={folder: "/opt/here"}))


@pytest.fixture
def images(place: Place) -> Iterator[str]:
    """The name before the tag of `bare`, without Python, and `python`."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_small_root(Path(folder, "root"))
        repository = f"localhost/upspiral-test-{os.getpid()}"
        place.says("import", "-", f"{repository}:bare", content=_tar(root))
        _add_python(root)
        changes = ["--change", "ENV MOTTO=small", "--change", "WORKDIR /srv/old"]
        place.says("import", *changes, "-", f"{repository}:python", content=_tar(root))
        try:
            yield repository
        finally:
            place.says("rmi", f"{repository}:bare", f"{repository}:python")


def _tar(root: Path) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.add(root, ".")
    return content.getvalue()


def _add_python(root: Path) -> None:
    """This machine's own."""
    where = "import os, sys; print(os.path.realpath(sys.executable), os.path.dirname(os.__file__))"
    told = subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", where], capture_output=True, timeout=60, check=False)
    if told.returncode != 0:
        pytest.skip("this machine has no python3 in /usr/bin to make an image of")
    program, library = told.stdout.decode().split()
    shutil.copy(program, root / "usr/bin/python3")
    unneeded = shutil.ignore_patterns("test", "dist-packages", "site-packages", "config-*", "__pycache__", "idlelib")
    shutil.copytree(library, root / library.lstrip("/"), ignore=unneeded)
    (foreign_functions,) = Path(library, "lib-dynload").glob("_ctypes.*.so")
    listed = subprocess.check_output(["ldd", program, foreign_functions], text=True, timeout=60)
    for needed in re.findall(r"(/\S+) \(0x", listed):
        target = root / needed.lstrip("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(needed, target)


def test_images_of_the_engine(place: Place, images: str) -> None:
    async def check(sandbox: Sandbox) -> None:
        assert await output(sandbox, "id -u; echo $MOTTO; pwd; ls") == "0\nsmall\n/srv/old\nfile\nmine\n"
        assert await sandbox.list_files() == ["file", "mine"]
        given_away = "echo x > /usr/bin/new && chown 5:6 /usr/bin/new && stat -c %u:%g /usr/bin/new"
        assert await output(sandbox, given_away) == "5:6\n"

    place.run_in(check, SandboxSpec(image=f"{images}:python", files={"mine": b""}))


def test_what_images_cannot_be_used(place: Place, images: str) -> None:
    async def check(backend: ContainerBackend) -> None:
        with pytest.raises(CapabilityError, match="no python3"):
            async with backend.acquire(SandboxSpec(image=f"{images}:bare")):
                pass
        with pytest.raises(ImageError, match="pull no-such-image"):
            async with backend.acquire(SandboxSpec(image="no-such-image")):
                pass
        with pytest.raises(SandboxError, match="no snapshot-x here"):
            async with backend.acquire(SandboxSpec(image=Snapshot("snapshot-x", "copied"))):
                pass

    place.run(check)


def test_snapshots_forks_and_going_back(place: Place) -> None:
    async def check(backend: ContainerBackend) -> None:
        async with backend.acquire(SandboxSpec(files={"a": b"1"})) as sandbox:
            await output(sandbox, "sleep 1000 >/dev/null 2>&1 & echo y > /tmp/y")
            snapshot = await sandbox.snapshot()
            assert snapshot.how == "copied"
            await output(sandbox, "echo 2 > a; echo new > b; rm /tmp/y")
            forks = await sandbox.fork(2)
            assert [await output(fork, "cat a b; ls /tmp/y || echo gone") for fork in forks] == ["2\nnew\ngone\n"] * 2
            await forks[0].write("a", b"0")
            assert await forks[1].read("a") == b"2\n" == await sandbox.read("a")
            await asyncio.gather(*(fork.stop() for fork in forks))
            before = sandbox.id
            await sandbox.restore(snapshot)
            assert sandbox.id == before
            seen = await output(sandbox, "cat a /tmp/y; ls b || echo gone; pgrep sleep || echo idle")
            assert seen == "1y\ngone\nidle\n"
            async with backend.acquire(SandboxSpec(image=snapshot, files={"c": b"3"})) as third:
                assert await output(third, "cat a c") == "13"
            await backend.drop(snapshot)
            with pytest.raises(SandboxError, match="dropped"):
                await sandbox.restore(snapshot)

    place.run(check)


def test_a_start_that_is_cancelled_leaves_nothing(place: Place) -> None:
    async def check(backend: ContainerBackend) -> None:
        async def acquire() -> None:
            async with backend.acquire(SandboxSpec()):
                await asyncio.sleep(TIMEOUT_S)

        async with backend.acquire(SandboxSpec()):
            pass  # which makes the image
        for delay_s in (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
            attempt = asyncio.ensure_future(acquire())
            await asyncio.sleep(delay_s)
            attempt.cancel()
            with pytest.raises(asyncio.CancelledError):
                await attempt
            left = [name for name in await asyncio.to_thread(place.left_of, os.getpid()) if ":" not in name]
            assert left == [], f"after {delay_s} s"

    place.run(check)


def test_stopping_the_backend_ends_a_start(place: Place) -> None:
    async def check(backend: ContainerBackend) -> None:
        async def acquire() -> None:
            async with backend.acquire(SandboxSpec()) as sandbox:
                await sandbox.list_files()

        attempt = asyncio.ensure_future(acquire())
        await asyncio.sleep(0.2)
        await backend.stop()
        with pytest.raises(SandboxGoneError):
            await attempt

    place.run(check)


_OWNER = """
import asyncio, sys
from pathlib import Path
from tests.sandbox import container_engines
from upspiral.sandbox.base import SandboxSpec

async def main():
    backend = container_engines.{name}_backend(Path({root!r}))
    async with backend.acquire(SandboxSpec()) as sandbox:
        await sandbox.spawn("sleep 1000")
        await sandbox.snapshot()
        print("ready", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_containers_end_with_a_killed_process_and_the_next_backend_sweeps(place: Place) -> None:
    script = _OWNER.format(name=place.name, root=str(place.root))
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert owner.stdout and owner.stdout.readline() == b"ready\n"
    owner.kill()
    owner.wait()

    def left() -> list[str]:
        return [name for name in place.left_of(owner.pid) if ":" not in name]

    wait_until(lambda: left() == [], "the container has ended with its owner")
    assert len(place.left_of(owner.pid)) == 2 and len(os.listdir(place.root)) == 1, "images and a folder are left"
    place.make(place.root)
    assert place.left_of(owner.pid) == [] and os.listdir(place.root) == []


def test_a_container_that_was_made_and_never_started_is_swept(place: Place) -> None:
    dead = dataclasses.replace(Owner.this_process(), boot="00000000")
    label = dead.label(place.name)
    place.says("import", "--change", f"LABEL {LABEL}={label}", "-", f"{label}:host", content=_empty_tar())
    place.says("create", f"--name={label}-7", f"--label={LABEL}={label}", "--network=none", "--ulimit=nofile=1024:1024",
               "--ulimit=nproc=1000:1000", f"{label}:host", "true")  # fmt: skip

    def left() -> list[str]:
        return [name for name in place.left_of(os.getpid()) if label in name]

    assert len(left()) == 2
    place.make(place.root)
    assert left() == []


def _empty_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return content.getvalue()
