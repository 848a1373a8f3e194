"""Abuse: files, links and archives that are not what they seem, in the hands of the host and of snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sandbox.conformance import TIMEOUT_S, Stage, output_of
from tests.sandbox.probes import python
from upspiral.sandbox.base import Limits, Sandbox, SandboxBackend, SandboxSpec


def test_links_that_change_while_the_host_reads_and_writes(stage: Stage, open_folder: Path) -> None:
    """A path is swapped between a folder of the sandbox and a link to one of the host's, as fast as it goes."""
    stage.needs("commands", "contained_files")
    (open_folder / "file").write_text("secret of the host")
    open_folder.chmod(0o777)
    swap = (
        "import os\nwhile True:\n    os.rename('x', 'folder')\n    os.symlink(%r, 'x')\n    os.unlink('x')\n"
        "    os.rename('folder', 'x')" % str(open_folder)
    )

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "mkdir x; echo own > x/file")
        swapping = await sandbox.spawn(python(swap))
        for number in range(150):
            try:
                await sandbox.write("x/new", b"from the host")
                assert await sandbox.read("x/file") == b"own\n"
                if number % 10 == 0:
                    await sandbox.upload(_tar("file2"), "x")
                    assert b"secret" not in await sandbox.download("x")
                    await sandbox.list_files("x")
            except OSError:
                continue
        await swapping.kill()
        assert await output_of(sandbox, "echo alive") == b"alive\n"

    stage.run(check)
    assert [(each.name, each.read_text()) for each in open_folder.iterdir()] == [("file", "secret of the host")]


def _tar(*names: str, change: Callable[[tarfile.TarInfo], None] = lambda member: None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mode = 1, 0o644
            change(member)
            archive.addfile(member, io.BytesIO(b"x"))
    return buffer.getvalue()


def test_targets_of_reading_that_have_no_end_or_never_begin(stage: Stage) -> None:
    stage.needs("commands", "robust_agent")
    targets = {
        "pipe": "mkfifo pipe", "zero": "ln -s /dev/zero zero", "terminal": "ln -s /dev/tty terminal",
        "own": "ln -s /proc/self/fd/0 own", "kmsg": "ln -s /proc/kmsg kmsg", "memory": "ln -s /proc/1/mem memory",
        "loop": "ln -s loop loop", "long": f"ln -s {'a/' * 2000} long", "tail": "ln -s /proc/1/fd/3 tail",
    }  # fmt: skip

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "; ".join(targets.values()) + "; true")
        for name in targets:
            async with asyncio.timeout(TIMEOUT_S):
                with pytest.raises(OSError):
                    await sandbox.read(name)
                if name not in ("zero", "long"):
                    with pytest.raises(OSError):
                        await sandbox.write(name, b"x")
        growing = await sandbox.spawn("while :; do echo more >> log; done")
        await sandbox.write("log", b"begin")
        assert len(await sandbox.read("log", max_bytes=1000)) <= 1000
        await growing.kill()
        assert await sandbox.list_files() == ["log"]

    stage.run(check)


def test_folders_that_change_while_they_are_packed(stage: Stage) -> None:
    """What is not there any more is an error, or is left out; the sandbox is as good as before."""
    stage.needs("commands", "robust_agent")
    churn = "import os\nwhile True:\n    os.rename('a', 'b')\n    open('b/new', 'w').write('x' * 99999)\n    os.unlink('b/new')\n    os.rename('b', 'a')"

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "mkdir a; for i in {1..200}; do echo $i > a/$i; done")
        process = await sandbox.spawn(python(churn))
        for _ in range(10):
            for attempt in (sandbox.list_files(), sandbox.download()):
                try:
                    await attempt
                except OSError:
                    continue
        await process.kill()
        assert await output_of(sandbox, "echo alive") == b"alive\n"

    stage.run(check)


def _retyped(kind: bytes, target: str = "") -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, target, 0

    return change


def _moded(mode: int) -> Callable[[tarfile.TarInfo], None]:
    return lambda member: setattr(member, "mode", mode)


def _sparse_pax(member: tarfile.TarInfo) -> None:
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 50)}


def _huge(archive: bytes) -> bytes:
    """The first member says that it has 2^60 bytes (base-256, as GNU tar writes large sizes)."""
    header = bytearray(archive)
    header[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


ARCHIVES = {
    "absolute": _tar("/tmp/absolute"),
    "parents": _tar("../../../../tmp/parents"),
    "devices": _tar("null", change=_retyped(tarfile.CHRTYPE)) + _tar("sda", change=_retyped(tarfile.BLKTYPE)),
    "a hard link to what is not there": _tar("hard", change=_retyped(tarfile.LNKTYPE, "/etc/shadow")),
    "modes": _tar("modes", change=_moded(0o7777)),
    "a pipe": _tar("pipe", change=_retyped(tarfile.FIFOTYPE)),
    "a size beyond everything": _huge(_tar("huge")),
    "a hole beyond everything": _tar("holes", change=_sparse_pax),
    "a name beyond everything": _tar("n" * 5000),
    "a deep name": _tar("d/" * 3000 + "x"),
    "an empty name": _tar(""),
    "an attribute beyond everything": _tar(
        "a", change=lambda member: setattr(member, "pax_headers", {"comment": "x" * 3_000_000})
    ),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_are_traps(stage: Stage, name: str) -> None:
    """Whatever becomes of them: nothing lies outside of their folder, no device is there, and the sandbox answers."""
    stage.needs("commands", "robust_agent")

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "mkdir into")
        with contextlib.suppress(OSError):
            await sandbox.upload(ARCHIVES[name], "into")
        assert await output_of(sandbox, "ls -A /tmp; ls -A; find into -type b -o -type c -o -perm /7000") == b"into\n"

    stage.run(check, limits=Limits(file_mb=1, disk_mb=16))


def test_a_download_has_a_limit_whatever_files_say_of_themselves(stage: Stage) -> None:
    stage.needs("commands", "robust_agent")

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "for i in {1..300}; do truncate -s 64M hole$i; done")
        with pytest.raises(OSError, match="larger"):
            await sandbox.download(max_bytes=32 << 20)
        assert await output_of(sandbox, "echo alive") == b"alive\n"

    stage.run(check)


def test_a_difference_has_a_limit_whatever_files_say_of_themselves(stage: Stage) -> None:
    """20 GB of holes are not 20 GB of the host's memory."""
    stage.needs("commands", "snapshot", "differences")

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "for i in {1..300}; do truncate -s 64M hole$i; done; sleep 1000 >/dev/null 2>&1 &")
        with pytest.raises(OSError, match="larger"):
            await sandbox.diff()
        assert await output_of(sandbox, "rm hole*; echo alive") == b"alive\n"
        assert (await sandbox.diff()).removed == []

    stage.run(check)


FORGERY = """
import os
os.makedirs('opaque/in')
open('opaque/in/file', 'w').write('x')
for path in ('opaque', 'opaque/in', 'opaque/in/file', '/tmp'):
    for name, value in (('opaque', b'y'), ('redirect', b'/etc'), ('metacopy', b''), ('whiteout', b'y'), ('overlay.opaque', b'y')):
        try:
            os.setxattr(path, f'user.overlay.{name}', value)
        except OSError:
            pass
for path in ('white', '/tmp/white', 'opaque/in/white'):
    try:
        os.mknod(path, 0o020644, 0)
        print('made', path)
    except OSError:
        pass
"""


@pytest.mark.parametrize("running", [False, True], ids=["sealed", "copied"])
def test_marks_of_overlays_that_were_made_inside(stage: Stage, running: bool) -> None:
    """In a fork, whose layers they are a part of, they hide nothing and lead nowhere."""
    stage.needs("commands", "snapshot")
    look = "cat opaque/in/file; ls -A opaque opaque/in /tmp; ls /tmp/passwd opaque/passwd 2>/dev/null; cat kept"

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, "echo kept > kept")
        await sandbox.snapshot()
        assert await output_of(sandbox, python(FORGERY)) == b""
        before = await output_of(sandbox, look)
        if running:
            await output_of(sandbox, "sleep 1000 >/dev/null 2>&1 &")
        for fork in await sandbox.fork(2):
            assert await output_of(fork, look) == before
            await fork.stop()

    stage.run(check)


def test_a_layer_full_of_oddities_is_copied_and_compared(stage: Stage) -> None:
    stage.needs("commands", "snapshot", "differences")
    lay = (
        "mkfifo pipe; ln -s /etc/shadow out; ln -s . here; mkdir locked; > locked/x; chmod 0 locked; > $'\\xff\\n'; "
        "truncate -s 60M hole; cp $(command -v id) set; chmod 6755 set; ln set other; "
        + python(
            "import os, socket\nsocket.socket(socket.AF_UNIX).bind('socket')\nfor i in range(1200):\n    os.mkdir('d')\n    os.chdir('d')"
        )
    )

    async def check(sandbox: Sandbox) -> None:
        await output_of(sandbox, f"{lay}; sleep 1000 >/dev/null 2>&1 &")
        (fork,) = await sandbox.fork()
        look = "readlink out here; stat -c '%a %h' set locked; stat -c %b hole; ./other -u; find d | wc -l"
        assert await output_of(fork, look) == await output_of(sandbox, look)
        await fork.stop()
        with tarfile.open(fileobj=io.BytesIO((await sandbox.diff()).archive)) as difference:
            members = {member.name: member for member in difference}
        assert members["work/out"].linkname == "/etc/shadow" and members["work/pipe"].isfifo()
        assert not any(member.isdev() and not member.isfifo() for member in members.values())
        await output_of(sandbox, "chmod 700 locked; rm -rf d locked")

    stage.run(check)


def test_a_sandbox_writes_in_no_other_s_layers(stage: Stage) -> None:
    """Forks stand on the same layer: what one does to it, by whatever name, none of the others sees."""
    stage.needs("commands", "snapshot")
    spoil = (
        "rm -rf gone; echo changed > file; chmod 0 mode; ln file link; mv folder elsewhere; "
        "truncate -s 0 long; for f in /proc/self/fd/*; do :; done; exec 9<>file; echo more >&9"
    )
    look = "cat file; ls -A . folder gone; stat -c '%a %h' mode file; wc -c < long"

    async def check(backend: SandboxBackend) -> None:
        async with backend.acquire(SandboxSpec()) as sandbox:
            await output_of(
                sandbox, "mkdir gone folder; > gone/x; > folder/y; echo file > file; > mode; echo long > long"
            )
            snapshot = await sandbox.snapshot()
            before = await output_of(sandbox, look)
            one, two = await sandbox.fork(2)
            await output_of(one, spoil)
            assert await output_of(two, look) == before
            assert await output_of(sandbox, look) == before
            async with backend.acquire(SandboxSpec(image=snapshot)) as later:
                assert await output_of(later, look) == before
            await asyncio.gather(one.stop(), two.stop())

    stage.run_backend(check)


def test_locked_and_deep_files_go_with_the_sandbox(stage: Stage) -> None:
    """`stage.run` asserts that nothing is left."""
    stage.needs("commands")
    done = stage.exec(
        "mkdir -p locked/in; > locked/in/x; chmod 0 locked/in locked; mkdir -p $(printf 'd/%.0s' {1..1500}); "
        "(exec 9> held; rm held; exec setsid sleep 1000 >/dev/null 2>&1) & echo made"
    )
    assert done.stdout == b"made\n"
