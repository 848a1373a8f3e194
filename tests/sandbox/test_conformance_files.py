"""Every backend: reading, writing, listing, and archives. What lies inside may be anything."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable

import pytest

from tests.sandbox.conformance import TIMEOUT_S, Stage, output_of
from upspiral.errors import CapabilityError
from upspiral.sandbox.base import Limits, Sandbox, SandboxBackend, SandboxSpec


def test_what_is_written_is_read(stage: Stage) -> None:
    async def check(sandbox: Sandbox) -> None:
        await sandbox.write("new/c.bin", bytes(range(256)))
        await sandbox.write("/work/a", b"longer text")
        await sandbox.write("a", b"short")
        await sandbox.write("empty", b"")
        assert await sandbox.read("/work/new/c.bin") == bytes(range(256))
        assert (await sandbox.read("a"), await sandbox.read("empty")) == (b"short", b"")
        assert await sandbox.read("new/c.bin", max_bytes=3) == b"\0\1\2"
        assert await sandbox.list_files() == ["a", "empty", "new/c.bin"]
        assert await sandbox.list_files("new") == ["c.bin"]
        for missing in ("b", "new", "a/b", "no/such/file", "x" * 300):
            with pytest.raises(FileNotFoundError):
                await sandbox.read(missing)

    stage.run(check)


def test_large_files(stage: Stage) -> None:
    content = os.urandom(1 << 20) * 30

    async def check(sandbox: Sandbox) -> None:
        await sandbox.write("large", content)
        assert await sandbox.read("large", max_bytes=1 << 30) == content
        assert await sandbox.read("large") == content[: 1 << 20]

    stage.run(check)


def test_files_belong_to_commands(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        await sandbox.write("tool", b"#!/bin/sh\necho ran\n", mode=0o755)
        await sandbox.write("data", b"x")
        assert (
            await output_of(sandbox, "./tool; stat -c %a tool data a/b; echo y >> data; rm a/b")
            == b"ran\n755\n644\n644\n"
        )
        await sandbox.write("tool", b"#!/bin/sh\n")
        assert await output_of(sandbox, "stat -c %a tool; cat data") == b"644\nxy\n"

    stage.run(check, files={"a/b": b""})


def test_only_regular_files_are_read_and_written(stage: Stage) -> None:
    stage.needs("commands")
    lay = (
        "mkfifo pipe; mkdir folder; ln -s loop loop; ln -s gone dangling; ln -s /dev/zero device; ln -s text link; "
        'echo hi > text; echo x > secret; chmod 0 secret; python3 -c "import socket; '
        "socket.socket(socket.AF_UNIX).bind('socket')\" || mkfifo socket"
    )

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, lay)
        for path in ("pipe", "folder", "loop", "dangling", "device", "socket", "secret", "/dev/zero", "/dev/tty", "/"):
            with pytest.raises(FileNotFoundError):
                await sandbox.read(path)
        for path in ("pipe", "folder", "loop", "device", "socket", "/dev/full", "text/x"):
            with pytest.raises(OSError):
                await sandbox.write(path, b"x")
        assert await sandbox.read("link") == b"hi\n"
        await sandbox.write("link", b"through")
        assert await sandbox.read("text") == b"through"
        assert await sandbox.list_files() == ["secret", "text"]
        for bad in ("", "a\0b", "half a pair \ud800"):
            with pytest.raises(ValueError):
                await sandbox.read(bad)
            with pytest.raises(ValueError):
                await sandbox.write(bad, b"")

    stage.run(check)


def test_the_agent_reads_and_writes_no_more_than_commands_may(stage: Stage) -> None:
    stage.needs("commands", "contained_files")

    async def check(sandbox: Sandbox) -> None:
        for path in ("/etc/shadow", "/proc/1/mem", "/proc/1/environ"):
            with pytest.raises(OSError):
                await sandbox.read(path)
        for path in ("/etc/passwd", "/usr/x"):
            with pytest.raises(OSError):
                await sandbox.write(path, b"x")

    stage.run(check)


def test_a_file_that_is_too_large_is_refused(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        with pytest.raises(OSError):
            await sandbox.write("big", b"x" * (3 << 20))
        with pytest.raises(OSError):
            await sandbox.upload(archive_of({"big": b"x" * (3 << 20)}))
        await sandbox.write("small", b"x" * (2 << 20))
        await output_of(sandbox, "echo alive")

    stage.run(check, limits=Limits(file_mb=2))


def test_names_that_are_no_text(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "echo 1 > $'\\xff'; echo 2 > $'a\\nb'; echo 3 > ' '")
        names = await sandbox.list_files()
        assert names == [" ", "a\nb", "\udcff"]
        assert [await sandbox.read(name) for name in names] == [b"3\n", b"2\n", b"1\n"]
        await sandbox.write("\udcfe/x", b"")
        assert "\udcfe/x" in await sandbox.list_files()

    stage.run(check)


def test_many_files_deep_folders_and_locked_ones(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "mkdir many; cd many; for i in {1..3000}; do > $i; done")
        await output_of(
            sandbox, "mkdir -p locked/in; > locked/in/x; chmod 0 locked; mkdir -p $(printf 'd/%.0s' {1..1500})"
        )
        files = await sandbox.list_files()
        assert len(files) in (3000, 3001) and len(await sandbox.list_files("many")) == 3000
        with pytest.raises(OSError):
            await sandbox.list_files("no/such/folder")
        await output_of(sandbox, "chmod 700 locked")

    stage.run(check)


def archive_of(files: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] = lambda member: None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            change(member)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def contents_of(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name.removeprefix("./"): file.read() for member in tar if (file := tar.extractfile(member))}


def test_archives_go_in_and_come_out(stage: Stage) -> None:
    files = {"a/b/c": b"text", "d": os.urandom(3 << 20), "e": b""}

    async def check(sandbox: Sandbox) -> None:
        await sandbox.upload(archive_of(files), "new/folder")
        assert contents_of(await sandbox.download("/work/new/folder")) == files
        assert contents_of(await sandbox.download("new")) == {
            f"folder/{name}": content for name, content in files.items()
        }
        with pytest.raises(OSError, match="larger than 1000 bytes"):
            await sandbox.download(max_bytes=1000)
        assert await sandbox.list_files("new/folder") == sorted(files)

    stage.run(check)


def test_archives_keep_modes_links_and_empty_folders(stage: Stage) -> None:
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        await output_of(
            sandbox, "mkdir -p x/empty; echo hi > x/f; chmod 750 x/f; ln -s f x/l; ln -s /usr/bin x/abs; ln x/f x/h"
        )
        await sandbox.upload(await sandbox.download("x"), "y")
        look = "cd {}; ls -d empty; stat -c '%a %h' f; readlink l abs; cat l"
        assert await output_of(sandbox, look.format("y")) == await output_of(sandbox, look.format("x"))
        mode_of_set_user_id = archive_of({"suid": b""}, lambda member: setattr(member, "mode", 0o6755))
        await sandbox.upload(mode_of_set_user_id)
        assert await output_of(sandbox, "stat -c %a suid") == b"755\n"

    stage.run(check)


def test_an_archive_replaces_pipes(stage: Stage) -> None:
    """Which whoever opens them to write waits at."""
    stage.needs("commands")

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "mkdir tests; mkfifo tests/a pipe; ln -s ../pipe tests/b")
        await sandbox.upload(archive_of({"tests/a": b"1", "tests/b": b"2"}))
        assert (await sandbox.read("tests/a"), await sandbox.read("tests/b")) == (b"1", b"2")

    stage.run(check)


def test_a_list_of_files_has_a_limit(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox may have more names than anybody wants, and is not broken by that."""
    stage.needs("commands")
    monkeypatch.setattr("upspiral.sandbox.connected._MAX_LIST_BYTES", 1000)

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "mkdir many; for i in {1..300}; do > many/$i; done")
        with pytest.raises(OSError, match="larger than 1000 bytes"):
            await sandbox.list_files()
        await output_of(sandbox, "rm many/???")
        assert len(await sandbox.list_files()) == 99

    stage.run(check)


def _linked(kind: bytes, target: str) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, target, 0

    return change


@pytest.mark.parametrize(
    "archive",
    [
        archive_of({"../evil": b"x"}),
        archive_of({"a/../../evil": b"x"}),
        archive_of({"link": b""}, _linked(tarfile.SYMTYPE, "/work")) + archive_of({"link/evil": b"x"}),
        archive_of({"hard": b""}, _linked(tarfile.LNKTYPE, "../outside")),
        archive_of({"device": b""}, _linked(tarfile.CHRTYPE, "")),
        b"this is no archive" * 1000,
        archive_of({"cut": b"x" * 100_000})[:50_000],
    ],
    ids=["parent", "parent below", "through a link", "hard link", "device", "no archive", "cut"],
)
def test_archives_that_lead_out_or_are_broken_are_refused(stage: Stage, archive: bytes) -> None:
    stage.needs("commands")
    # Two archives in a row are one whose first end is not believed: take the second's members as members of the first.
    whole = _without_ends(archive)

    async def check(sandbox: Sandbox) -> None:
        with pytest.raises(OSError):
            await sandbox.upload(whole, "into")
        assert "evil" not in " ".join(await sandbox.list_files())
        assert await sandbox.read("outside") == b"untouched"
        await output_of(sandbox, "test ! -e into/hard && test ! -c into/device")

    stage.run(check, files={"outside": b"untouched"})


def _without_ends(archives: bytes) -> bytes:
    """One archive of the members of several that were written one after the other."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archives), ignore_zeros=True) as source:
            members = [(member, file.read() if (file := _file_of(source, member)) else b"") for member in source]
    except tarfile.TarError:
        return archives
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue() if len(members) > 1 else archives


def _file_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> io.BufferedReader | None:
    return archive.extractfile(member) if member.isreg() else None  # type: ignore[return-value]


def test_operations_of_other_backends_are_refused_by_name(stage: Stage) -> None:
    async def check(sandbox: Sandbox) -> None:
        for attempt in (sandbox.snapshot(), sandbox.fork(), sandbox.diff()):
            with pytest.raises(CapabilityError):
                await attempt

    if stage.capabilities.snapshot:
        pytest.skip(f"the {stage.entry.name} backend can take snapshots")
    stage.run(check)


def test_forks_and_snapshots_have_the_files_of_their_moment(stage: Stage) -> None:
    stage.needs("snapshot")

    async def check(backend: SandboxBackend) -> None:
        async with backend.acquire(SandboxSpec(files={"a": b"1", "gone": b"x"})) as sandbox:
            await sandbox.write("b", b"2")
            snapshot = await sandbox.snapshot()
            forks = await sandbox.fork(3)
            await sandbox.write("a", b"changed")
            for number, fork in enumerate(forks):
                assert (await fork.read("a"), await fork.read("b")) == (b"1", b"2")
                await fork.write("own", str(number).encode())
            assert [await fork.read("own") for fork in forks] == [b"0", b"1", b"2"]
            assert await sandbox.list_files() == ["a", "b", "gone"]
            async with backend.acquire(SandboxSpec(image=snapshot, files={"b": b"3"})) as later:
                assert (await later.read("a"), await later.read("b")) == (b"1", b"3")
            await sandbox.restore(snapshot)
            assert (await sandbox.read("a"), await sandbox.list_files()) == (b"1", ["a", "b", "gone"])
            for fork in forks:
                await fork.stop()
            await backend.drop(snapshot)

    stage.run_backend(check)


def test_a_fork_of_a_sandbox_with_limits_runs_commands(stage: Stage) -> None:
    stage.needs("snapshot", "commands")

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "mkdir -p d/e; echo 1 > d/e/f; ln -s e d/l; chmod 700 d/e; rm gone")
        fork = (await sandbox.fork())[0]
        assert await output_of(fork, "cat d/l/f; stat -c %a d/e; test ! -e gone") == b"1\n700\n"
        done = await fork.exec("sleep 1000", timeout_s=0.3)
        assert done.timed_out
        await fork.stop()
        assert (await sandbox.exec("echo alive", timeout_s=TIMEOUT_S)).stdout == b"alive\n"

    stage.run(check, files={"gone": b""})
