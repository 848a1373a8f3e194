"""Snapshots, forks, restoring and differences of namespace sandboxes."""

from __future__ import annotations

import asyncio
import io
import tarfile
from pathlib import Path

import pytest

from tests.unit.sandbox.namespace_stage import TIMEOUT_S, in_backend, in_sandbox, keepers, output_of
from upspiral.errors import SandboxError
from upspiral.sandbox.base import Diff, Limits, SandboxSpec, Snapshot
from upspiral.sandbox.namespace import NamespaceBackend
from upspiral.sandbox.namespace.sandbox import NamespaceSandbox

TREE = "mkdir -p d/e; echo one > d/e/f; ln -s f d/e/l; ln d/e/f d/e/h; chmod 700 d; echo $RANDOM$RANDOM > random"
LOOK = "find . -printf '%p %y %m %n %l\\n' | sort; cat random d/e/f"


def kinds(diff: Diff) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(diff.archive)) as archive:
        return {member.name: member.type.decode() for member in archive}


@pytest.mark.parametrize("how", ["sealed", "copied"])
def test_forks_have_the_files_and_are_isolated(tmp_path: Path, how: str) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        await output_of(sandbox, TREE)
        if how == "copied":
            await output_of(sandbox, "sleep 1000 >/dev/null 2>&1 &")
        before = await output_of(sandbox, LOOK)
        snapshot = await sandbox.snapshot()
        assert snapshot.how == how
        forks = await sandbox.fork(3)
        try:
            assert len({sandbox.id, *(fork.id for fork in forks)}) == 4
            assert [await output_of(each, LOOK) for each in (sandbox, *forks)] == [before] * 4
            for number, each in enumerate(forks):
                await output_of(each, f"echo {number} > mine; echo {number} > d/e/f; rm random; rm -r d; mkdir d")
            assert await output_of(sandbox, "echo parent > random; cat d/e/f") == "one\n"
            assert [await output_of(each, "cat mine; ls d; ls") for each in forks] == [
                f"{number}\nd\nmine\n" for number in range(3)
            ]
        finally:
            await asyncio.gather(*(each.stop() for each in forks))
        assert await output_of(sandbox, "cat random; ls") == "parent\nd\nrandom\n"

    in_sandbox(check, tmp_path)


def test_what_runs_goes_on_after_a_snapshot(tmp_path: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        await output_of(sandbox, "(while :; do echo x >> ticks; sleep 0.02; done) >/dev/null 2>&1 &")
        running = asyncio.create_task(sandbox.exec("sleep 0.5; echo end", timeout_s=TIMEOUT_S))
        await asyncio.sleep(0.1)
        assert (await sandbox.snapshot()).how == "copied"
        assert (await running).stdout == b"end\n"
        before = int(await output_of(sandbox, "wc -l < ticks"))
        await asyncio.sleep(0.3)
        assert int(await output_of(sandbox, "wc -l < ticks")) > before

    in_sandbox(check, tmp_path)


def test_commands_that_begin_while_a_sandbox_is_sealed_wait_for_it(tmp_path: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        for number in range(10):
            sealing = asyncio.create_task(sandbox.snapshot())
            await asyncio.sleep(0)
            commands = [sandbox.exec(f"echo {each} >> f; echo {each}", timeout_s=TIMEOUT_S) for each in range(5)]
            done = await asyncio.gather(*commands)
            assert [each.stdout for each in done] == [f"{each}\n".encode() for each in range(5)]
            assert (await sealing).how in ("sealed", "copied")
            assert int(await output_of(sandbox, "wc -l < f")) == 5 * (number + 1)

    in_sandbox(check, tmp_path)


def test_a_snapshot_takes_nothing_from_its_sandbox(tmp_path: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        await output_of(sandbox, "echo 1 > a; echo 2 > /dev/shm/b")
        await sandbox.snapshot()
        assert await output_of(sandbox, "cat a /dev/shm/b") == "1\n2\n"
        await output_of(sandbox, "rm /dev/shm/b")
        assert (await sandbox.snapshot()).how == "sealed"

    in_sandbox(check, tmp_path)


def test_what_lies_in_the_place_of_a_folder_is_no_failure_of_a_snapshot(tmp_path: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        await output_of(sandbox, "chmod u+w / /var; rm -r /tmp /var/tmp; echo mine > /tmp; ln -s nowhere /var/tmp")
        assert (await sandbox.snapshot()).how == "sealed"
        assert await output_of(sandbox, "cat /tmp; readlink /var/tmp") == "mine\nnowhere\n"

    in_sandbox(check, tmp_path)


@pytest.mark.parametrize(
    "instead", ["> /opt", "ln -s nowhere /opt", "ln -s /usr /opt", "mkdir -p /opt/a; mkfifo /opt/a/b"]
)
def test_what_lies_in_the_way_of_a_mount_is_no_failure_of_a_snapshot(tmp_path: Path, instead: str) -> None:
    shared, root = tmp_path / "shared", tmp_path / "root"
    for folder in (shared, root):
        folder.mkdir()
    (shared / "f").write_text("shared")

    async def check(sandbox: NamespaceSandbox) -> None:
        await output_of(sandbox, f"chmod u+w /; mv /opt /other; {instead}")
        await sandbox.snapshot()
        assert await output_of(sandbox, "cat /opt/a/b/f") == "shared"

    in_sandbox(check, root, SandboxSpec(mounts={str(shared): "/opt/a/b"}))


def test_a_copy_outlives_its_sandbox(tmp_path: Path) -> None:
    """And so do the layers below, on which nobody else stands any more."""

    async def check(backend: NamespaceBackend) -> None:
        (keeper,) = keepers()

        def num_layers() -> int:
            return Path(f"/proc/{keeper}/mounts").read_text().count("/layers/")

        async with backend.acquire(SandboxSpec(files={"below": b"1"})) as sandbox:
            (fork,) = await sandbox.fork()
        await output_of(fork, "sleep 1000 >/dev/null 2>&1 & for i in {1..10000}; do > $i; done")
        copying = asyncio.create_task(fork.snapshot())
        while num_layers() < 2:
            await asyncio.sleep(0)
        await fork.stop()
        assert not copying.done()
        snapshot = await copying
        async with backend.acquire(SandboxSpec(image=snapshot)) as other:
            assert await output_of(other, "cat below; ls | wc -l") == "110001\n"
        await backend.drop(snapshot)
        assert num_layers() == 0

    in_backend(check, tmp_path)


def test_a_snapshot_is_an_image_until_it_is_dropped(tmp_path: Path) -> None:
    async def check(backend: NamespaceBackend) -> None:
        async with backend.acquire(SandboxSpec(files={"a": b"1"})) as sandbox:
            snapshot = await sandbox.snapshot()
            await sandbox.write("a", b"2")
        spec = SandboxSpec(image=snapshot, files={"b": b"3"}, env={"X": "y"})
        async with backend.acquire(spec) as other:
            await backend.drop(snapshot)
            assert await output_of(other, "cat a b; echo $X; whoami") == "13y\nagent\n"
        for gone in (snapshot, Snapshot("snapshot-of-another", "sealed")):
            with pytest.raises(SandboxError, match="dropped"):
                async with backend.acquire(SandboxSpec(image=gone)):
                    pass
        await backend.drop(snapshot)

    in_backend(check, tmp_path)


def test_restoring_takes_back_files_and_ends_what_runs(tmp_path: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        await output_of(sandbox, TREE)
        before = await output_of(sandbox, LOOK)
        snapshot = await sandbox.snapshot()
        name = sandbox.id
        for _ in range(2):
            await output_of(sandbox, "rm -r d random; echo x > x; sleep 1000 >/dev/null 2>&1 &")
            running = asyncio.create_task(sandbox.exec("sleep 1000", timeout_s=TIMEOUT_S))
            await asyncio.sleep(0.1)
            await sandbox.restore(snapshot)
            with pytest.raises(SandboxError):
                await running
            assert (await output_of(sandbox, LOOK), sandbox.id) == (before, name)
            assert await output_of(sandbox, "set -- /proc/[0-9]*; echo $#") == "2\n", "the agent and bash"

    in_sandbox(check, tmp_path)


def test_a_fork_of_a_shell_runs_its_commands_again(tmp_path: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        shell = await sandbox.shell()
        await shell.run("mkdir -p sub; cd sub; X=1; f() { echo $X-$PWD; }", timeout_s=TIMEOUT_S)
        other = await sandbox.shell()
        await other.close()
        (fork,) = await sandbox.fork()
        try:
            await shell.run("X=2", timeout_s=TIMEOUT_S)
            inherited, new = await fork.shell(), await fork.shell()
            assert (shell.restored, inherited.restored, new.restored) == ("new", "replayed", "new")
            assert (await inherited.run("f", timeout_s=TIMEOUT_S)).stdout == b"1-/work/sub\n"
            assert (await shell.run("f", timeout_s=TIMEOUT_S)).stdout == b"2-/work/sub\n"
        finally:
            await fork.stop()

    in_sandbox(check, tmp_path)


@pytest.mark.parametrize("sealed", [False, True])
def test_diff_tells_what_was_written(tmp_path: Path, sealed: bool) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        await output_of(sandbox, TREE + "; mkfifo p; touch gone; mkdir -p old/x /tmp/t; echo > /tmp/t/u")
        if sealed:
            await sandbox.snapshot()
        await output_of(sandbox, "rm gone; rm -r old; mkdir old; echo > old/y; echo two > d/e/f")
        if sealed:
            assert (await sandbox.snapshot()).how == "sealed"
        diff = await sandbox.diff()
        expected = {"work/d": "5", "work/d/e": "5", "work/d/e/f": "0", "work/d/e/l": "2", "work/old": "5",
                    "work/old/y": "0", "work/p": "6", "work/random": "0", "tmp/t": "5", "tmp/t/u": "0"}  # fmt: skip
        found = kinds(diff)
        assert found.pop("work/d/e/h") in ("0", "1")
        assert (found, list(diff.removed)) == (expected, [])
        (tmp_path / "unpacked").mkdir()
        with tarfile.open(fileobj=io.BytesIO(diff.archive)) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data", members=[
                each for each in archive if not each.isfifo()
            ])  # fmt: skip
        assert (tmp_path / "unpacked/work/d/e/f").read_text() == "two\n"
        for path in sorted((tmp_path / "unpacked").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        (tmp_path / "unpacked").rmdir()

    in_sandbox(check, tmp_path)


def test_a_long_line_of_snapshots(tmp_path: Path) -> None:
    """Deeper than overlays should be; what was removed stays removed, and layers do not heap up."""

    async def check(sandbox: NamespaceSandbox) -> None:
        (keeper,) = keepers()
        for number in range(70):
            await output_of(sandbox, f"echo {number} > f{number}; rm -f f{number - 2}; rm -rf d; mkdir d; > d/{number}")
            snapshot = await sandbox.snapshot()
            assert snapshot.how == "sealed"
        assert await output_of(sandbox, "ls; ls d") == "d\nf68\nf69\n69\n"
        mounts = Path(f"/proc/{keeper}/mounts").read_text()
        assert mounts.count("/layers/") <= 72

    in_sandbox(check, tmp_path)


def test_layers_that_nobody_stands_on_are_gone(tmp_path: Path) -> None:
    async def check(backend: NamespaceBackend) -> None:
        (keeper,) = keepers()

        def num_layers() -> int:
            return Path(f"/proc/{keeper}/mounts").read_text().count("/layers/")

        async with backend.acquire(SandboxSpec(files={"a": b"1"})) as sandbox:
            first = await sandbox.snapshot()
            await sandbox.write("b", b"2")
            forks = await sandbox.fork(4)
            assert num_layers() == 2, "the snapshot's and the forks'"
            await backend.drop(first)
            assert num_layers() == 2, "others stand on both"
            await asyncio.gather(*(each.stop() for each in forks))
            assert num_layers() == 2, "the sandbox itself does"
        assert num_layers() == 0

    in_backend(check, tmp_path)


def test_a_sandbox_that_has_written_nothing_since_its_last_snapshot_is_left_alone(tmp_path: Path) -> None:
    async def check(backend: NamespaceBackend) -> None:
        (keeper,) = keepers()
        async with backend.acquire(SandboxSpec(files={"a": b"1"})) as sandbox:
            await sandbox.snapshot()
            process = int(await output_of(sandbox, "sleep 1000 >/dev/null 2>&1 & echo $!"))
            (fork,) = await sandbox.fork()
            assert (await sandbox.snapshot()).how == "sealed"
            assert Path(f"/proc/{keeper}/mounts").read_text().count("/layers/") == 1
            assert await output_of(sandbox, f"kill -0 {process}; rm a; echo 2 > b; ls") == "b\n"
            assert await output_of(fork, "ls") == "a\n"
            (fork,) = await sandbox.fork()
            assert await output_of(fork, "ls") == "b\n", "that something is gone has been written, too"

    in_backend(check, tmp_path)


def test_the_disk_is_one_however_often_it_is_sealed(tmp_path: Path) -> None:
    async def check(sandbox: NamespaceSandbox) -> None:
        written = 0
        for number in range(5):
            done = await sandbox.exec(f"head -c 4M /dev/zero > {number}; stat -c %s {number}", timeout_s=TIMEOUT_S)
            written += int(done.stdout)
            await sandbox.snapshot()
        assert 8 << 20 <= written <= 14 << 20

    in_sandbox(check, tmp_path, SandboxSpec(limits=Limits(disk_mb=10)))
