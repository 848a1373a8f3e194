"""Layers: archives that mean harm, what of archives is kept, digests, and stacks merged as overlayfs shows them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.tar_files import Member, folder, link, make_tar, stream
from upspiral.errors import ImageError
from upspiral.sandbox.images.archive import copy_folder, unpack_docker_layer, unpack_tar
from upspiral.sandbox.images.layer import LayerWriter, is_opaque, measure, merge

KEEPS = os.geteuid() == 0


def write(target: Path, *members: Member, below: Sequence[Path] = (), docker: bool = False) -> LayerWriter:
    target.mkdir(exist_ok=True)
    writer = LayerWriter(target, below=below, keep_owners=KEEPS)
    (unpack_docker_layer if docker else unpack_tar)(stream(make_tar(members)), writer)
    writer.finish()
    return writer


def listed(root: Path) -> Mapping[str, str]:
    """What is in a folder: contents of files, targets of links, marks of what is hidden."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(root))
        if stat.S_ISDIR(status.st_mode):
            found[name] = "opaque/" if is_opaque(path) else "/"
        elif stat.S_ISLNK(status.st_mode):
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = path.read_text() if stat.S_ISREG(status.st_mode) else "hidden"
    return found


def test_members_become_what_they_are(tmp_path: Path) -> None:
    writer = write(
        tmp_path / "l",
        folder("./a", 0o1777),
        Member("./a/file", b"text", mode=0o640),
        link("a/link", "../../../etc/passwd"),
        link("hard", "a/file", "hard"),
        Member("/b/c/implied", b"x"),
        Member("naïve \udcff", b"y"),
    )
    root = tmp_path / "l"
    assert listed(root) == {
        "a": "/", "a/file": "text", "a/link": "-> ../../../etc/passwd", "b": "/", "b/c": "/", "b/c/implied": "x",
        "hard": "text", "naïve \udcff": "y",
    }  # fmt: skip
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o1777
    assert stat.S_IMODE((root / "a/file").stat().st_mode) == 0o640
    assert stat.S_IMODE((root / "b").stat().st_mode) == 0o755
    assert (root / "hard").stat().st_ino == (root / "a/file").stat().st_ino
    assert (root / "a/file").stat().st_mtime == 1_700_000_000 == (root / "a").stat().st_mtime
    assert writer.skipped == 0
    size = measure(root, keep_owners=KEEPS)[1]
    assert (size.files, size.content_bytes) == (4, len("text") + len("x") + len("y"))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([Member("../evil", b"x")], "leads out"),
        ([Member("a/../../evil", b"x")], "leads out"),
        ([Member("/../evil", b"x")], "leads out"),
        ([link("a", "/tmp"), Member("a/evil", b"x")], "through 'a', a link"),
        ([link("a", ".."), Member("a/evil", b"x")], "through 'a', a link"),
        ([link("a", ".."), folder("a/b")], "through 'a', a link"),
        ([link("a", "b"), link("b", "/tmp"), Member("a/evil", b"x")], "through 'a', a link"),
        ([Member("a", b"x"), Member("a/evil", b"x")], "through 'a', a file"),
        ([link("a", "/etc"), link("b", "a/shadow", "hard")], "hard link"),
        ([link("b", "/etc/shadow", "hard")], "hard link"),
        ([link("b", "../../etc/shadow", "hard")], "leads out"),
        ([link("b", "later", "hard"), Member("later")], "hard link"),
        ([folder("a"), link("b", "a", "hard")], "hard link"),
        ([Member(".", b"x")], "root"),
        ([Member("a" * 300, b"x")], "could not be unpacked"),
    ],
)
def test_an_archive_that_leads_out_is_refused(tmp_path: Path, members: Sequence[Member], said: str) -> None:
    outside = set(tmp_path.parent.iterdir())
    with pytest.raises(ImageError, match=said):
        write(tmp_path / "l", *members)
    assert [path.name for path in tmp_path.iterdir()] == ["l"]
    assert set(tmp_path.parent.iterdir()) == outside
    assert not Path("/tmp/evil").exists()


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("safe")
    write(tmp_path / "l", link("a", str(victim)), Member("a", b"evil"), link("d", str(tmp_path)), folder("d", 0o777))
    assert listed(tmp_path / "l") == {"a": "evil", "d": "/"}
    assert victim.read_text() == "safe"
    assert stat.S_IMODE(tmp_path.stat().st_mode) != 0o777


def test_later_members_replace_earlier_ones(tmp_path: Path) -> None:
    write(
        tmp_path / "l",
        folder("a"), Member("a/b/c", b"1"), Member("x", b"1"), link("y", "x"),
        Member("a", b"2"), Member("x", b"2"), folder("y"), Member("y/in", b"2"),
    )  # fmt: skip
    assert listed(tmp_path / "l") == {"a": "2", "x": "2", "y": "/", "y/in": "2"}


def test_devices_and_dangerous_bits_are_left_out(tmp_path: Path) -> None:
    writer = write(
        tmp_path / "l",
        Member("sda", kind="block"), Member("null", kind="device"), Member("pipe", kind="fifo"), folder("s", 0o2755),
        Member("su", b"x", mode=0o6755), Member("secret", b"x", mode=0o000), folder("locked", 0o000),
    )  # fmt: skip
    assert writer.skipped == 3
    modes = {path.name: f"{stat.S_IMODE(path.stat().st_mode):o}" for path in (tmp_path / "l").iterdir()}
    assert modes == {"su": "755", "secret": "400", "locked": "700", "s": "2755"}


@pytest.mark.skipif(not KEEPS, reason="needs root to give files away")
def test_owners_are_kept_by_root(tmp_path: Path) -> None:
    write(tmp_path / "l", Member("f", owner=(7, 8)), folder("d", owner=(9, 10)), link("s", "f"))
    owners = {path.name: (path.lstat().st_uid, path.lstat().st_gid) for path in (tmp_path / "l").iterdir()}
    assert owners == {"f": (7, 8), "d": (9, 10), "s": (0, 0)}
    write(tmp_path / "m", Member("f"), folder("d"), link("s", "f"))
    assert measure(tmp_path / "l", keep_owners=True)[0] != measure(tmp_path / "m", keep_owners=True)[0]


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, bz2.compress, lzma.compress, pyarrow.Codec("zstd").compress]
)
def test_compressed_archives(tmp_path: Path, compress) -> None:
    writer = LayerWriter(tmp_path)
    unpack_tar(stream(bytes(compress(make_tar([Member("a/b", b"text" * 100_000)])))), writer)
    assert (tmp_path / "a/b").read_text() == "text" * 100_000


@pytest.mark.parametrize("cut", [10, 600, 1500, 40_000])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_a_damaged_archive_is_said(tmp_path: Path, compress, cut: int) -> None:
    whole = compress(make_tar([Member("a", os.urandom(50_000)), Member("b", os.urandom(50_000))]))
    with pytest.raises(ImageError, match=r"damaged|unpacked"):
        unpack_tar(stream(whole[:cut]), LayerWriter(tmp_path))


def test_damage_between_members_is_not_taken_for_the_end(tmp_path: Path) -> None:
    whole = bytearray(make_tar([Member("a", b"x" * 600), Member("b", b"y")]))
    whole[1540] ^= 1  # in the second header
    with pytest.raises(ImageError, match="damaged"):
        unpack_tar(stream(bytes(whole)), LayerWriter(tmp_path))
    with pytest.raises(ImageError, match="damaged"):  # cut within the second header
        unpack_tar(stream(make_tar([Member("c", b"x" * 600), Member("d", b"y")])[:1700]), LayerWriter(tmp_path))


def header(kind: bytes, size: int, name: str = "x", **pax: str) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.pax_headers = kind, size, pax
    return member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


def sparse(size: int) -> bytes:
    """A file of holes alone, but for 512 bytes."""
    said = {"major": "1", "minor": "0", "name": "holes", "realsize": str(size)}
    pax = {f"GNU.sparse.{name}": value for name, value in said.items()}
    return header(tarfile.REGTYPE, 1024, **pax) + b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512 + bytes(1024)


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (header(tarfile.XHDTYPE, 1 << 40) + b"x" * 5000, "a header that says"),
        (header(tarfile.GNUTYPE_LONGNAME, 1 << 40) + b"x" * 5000, "a header that says"),
        (header(tarfile.GNUTYPE_LONGNAME, 0) * 3000, "recursion"),
        (header(tarfile.REGTYPE, 0, **{"GNU.sparse.map": "a,b"}), "damaged"),
        (header(tarfile.SYMTYPE, 0, linkpath="a\0b"), "damaged"),
        (sparse(1 << 50), "bytes of holes"),
    ],
    ids=["pax", "name", "chain", "map", "nul", "holes"],
)
def test_an_archive_that_means_harm_is_one_error(tmp_path: Path, archive: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        unpack_tar(stream(archive + bytes(1024)), LayerWriter(tmp_path))


def test_holes_and_odd_times_are_no_harm(tmp_path: Path) -> None:
    (tmp_path / "l").mkdir()
    odd = header(tarfile.REGTYPE, 0, "odd", mtime="nan")
    writer = LayerWriter(tmp_path / "l")
    unpack_tar(stream(odd + sparse(1 << 20)), writer)
    assert (tmp_path / "l/holes").read_bytes() == b"x" * 512 + bytes((1 << 20) - 512)
    assert (tmp_path / "l/odd").stat().st_mtime == 0


def test_a_layer_may_hide_everything(tmp_path: Path) -> None:
    write(tmp_path / "bottom", Member("a"), Member("d/x"), Member("e"), Member("f/x"))
    write(tmp_path / "middle", Member(".wh.e"), docker=True, below=[tmp_path / "bottom"])
    write(tmp_path / "l", Member(".wh..wh..opq"), Member("f/y", b"y"), docker=True,
          below=[tmp_path / "middle", tmp_path / "bottom"])  # fmt: skip
    assert listed(tmp_path / "l") == {"a": "hidden", "d": "hidden", "f": "opaque/", "f/y": "y"}


def test_docker_marks_hide_what_is_below(tmp_path: Path) -> None:
    names = ("etc/gone", "opt/old", "both", "tree/out", ".wh.plnk")
    write(tmp_path / "bottom", *(Member(each, b"o") for each in names))
    write(
        tmp_path / "l",
        Member("etc/.wh.gone"), Member("opt/.wh..wh..opq"), Member("opt/new", b"n"), Member(".wh..wh.plnk"),
        Member(".wh.both"), Member("both", b"stays"), Member(".wh.tree"), Member("tree/in", b"t"),
        Member(".wh.never-was"), Member("opt/.wh.old"), Member("new/.wh..wh..opq"),
        docker=True, below=[tmp_path / "bottom"],
    )  # fmt: skip
    assert listed(tmp_path / "l") == {
        "etc": "/", "etc/gone": "hidden", "opt": "opaque/", "opt/new": "n", "both": "stays", "tree": "opaque/",
        "tree/in": "t",
    }  # fmt: skip


def test_folders_that_are_not_named_look_as_below(tmp_path: Path) -> None:
    write(tmp_path / "bottom", folder("tmp", 0o1777), folder("srv", 0o700, (5, 5)), folder("a", 0o750))
    write(tmp_path / "top", link("a", "/tmp"), Member(".wh.srv"), docker=True, below=[tmp_path / "bottom"])
    writer = write(tmp_path / "l", Member("tmp/x"), Member("srv/x"), Member("a/x"),
                   below=[tmp_path / "top", tmp_path / "bottom"])  # fmt: skip
    del writer
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "l").iterdir()}
    assert modes == {"tmp": 0o1777, "srv": 0o755, "a": 0o755}
    write(tmp_path / "odd", folder(".", 0o711))
    write(tmp_path / "m", Member("x"), below=[tmp_path / "odd"])
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o711


def test_removed_paths_in_odd_orders(tmp_path: Path) -> None:
    write(tmp_path / "bottom", Member("gone/deep"), Member("now/file/x"), Member("was/x"), Member("now/y"))
    (tmp_path / "l").mkdir()
    writer = LayerWriter(tmp_path / "l", below=[tmp_path / "bottom"])
    unpack_tar(stream(make_tar([Member("now/file", b"f"), Member("was/a/folder")])), writer)
    for path in ("/gone/deep", "gone", "/now/file/x", "/was", "/was/x", "/", "never", "now/never"):
        writer.remove(path)
    with pytest.raises(ImageError, match="leads out"):
        writer.remove("/../../x")
    writer.finish()
    assert listed(tmp_path / "l") == {
        "gone": "hidden", "now": "/", "now/file": "f", "was": "opaque/", "was/a": "/", "was/a/folder": "",
    }  # fmt: skip


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    def digest(name: str, *members: Member) -> str:
        write(tmp_path / name, *members, docker=True, below=[tmp_path / "bottom"])
        return measure(tmp_path / name, keep_owners=KEEPS)[0]

    write(tmp_path / "bottom", Member("x"), Member("d/x"))
    members = [folder("d"), Member("d/a", b"1"), Member("b", b"2"), link("l", "b")]
    same = digest("same", *members)
    assert digest("again", *reversed(members[1:]), folder("d")) == same
    assert digest("other time", *(Member(**{**vars(each), "mtime": 5}) for each in members)) == same
    others = [
        digest("content", *members[:2], Member("b", b"3"), members[3]),
        digest("mode", *members[:2], Member("b", b"2", mode=0o755), members[3]),
        digest("folder mode", folder("d", 0o700), *members[1:]),
        digest("target", *members[:3], link("l", "c")),
        digest("name", *members[:3], link("m", "b")),
        digest("kind", *members[:3], Member("l", b"b", mode=0o777)),
        digest("hidden", *members, Member(".wh.x")),
        digest("opaque", *members, Member("d/.wh..wh..opq")),
        digest("moved", folder("d"), Member("a", b"1"), *members[2:]),
    ]
    assert len({same, *others}) == 10


def test_the_digest_does_not_depend_on_who_unpacked(tmp_path: Path) -> None:
    """Another process, another user where there is one, gives the same digest."""
    members = [
        folder("d", 0o000),
        Member("d/a", b"1", mode=0o000),
        link("l", "d"),
        Member("d/.wh.x"),
        folder("g", 0o2755),
    ]
    write(tmp_path / "l", *members, docker=True)
    here = measure(tmp_path / "l", keep_owners=KEEPS)[0]
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        "from upspiral.sandbox.images.archive import unpack_docker_layer\n"
        "from upspiral.sandbox.images.layer import LayerWriter, measure\n"
        "import encodings.idna, tarfile, gzip, hashlib, shutil\n"
        "os.umask(0o077)\nos.geteuid() or (os.setgroups([]), os.setresgid(*[61234] * 3), os.setresuid(*[61234] * 3))\n"
        "root = Path(sys.argv[1]) / 'files'; root.mkdir()\n"
        "writer = LayerWriter(root); unpack_docker_layer(sys.stdin.buffer, writer); writer.finish()\n"
        "print(measure(root, keep_owners=False)[0]); shutil.rmtree(root)\n"
    )
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    for parent in shared.parents:
        if parent.owner() == shared.owner() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", program, str(shared)],
        input=make_tar(members), capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.decode().split() == [here]


def test_a_folder_of_this_machine_becomes_a_layer(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d/a").write_text("1")
    (source / "l").symlink_to("/nowhere")
    os.link(source / "d/a", source / "z")
    os.mkfifo(source / "pipe")
    (tmp_path / "l").mkdir()
    writer = LayerWriter(tmp_path / "l")
    copy_folder(source, writer, place="/srv/x")
    copy_folder(source / "d/a", writer, place="/one")
    writer.finish()
    assert listed(tmp_path / "l") == {
        "one": "1", "srv": "/", "srv/x": "/", "srv/x/d": "/", "srv/x/d/a": "1", "srv/x/l": "-> /nowhere",
        "srv/x/z": "1",
    }  # fmt: skip
    assert writer.skipped == 1


def test_files_are_put_where_links_of_the_image_lead(tmp_path: Path) -> None:
    """A folder `bin` of its own would hide all programs of an image whose /bin is a link."""
    write(
        tmp_path / "bottom", Member("usr/bin/sh"), link("bin", "usr/bin"), link("loop", "loop"), Member("file"),
        link("up", "../../../usr"), link("abs", "/usr"), link("srv", "nowhere"), link("to-file", "file"),
    )  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    (source / "tool").write_text("t")
    (tmp_path / "shortcut").symlink_to("source")
    (tmp_path / "l").mkdir()
    writer = LayerWriter(tmp_path / "l", below=[tmp_path / "bottom"])
    for place in ("/bin/one", "/up/two", "/abs/three", "/srv/four", "/to-file"):
        copy_folder(source / "tool", writer, place=place)
    copy_folder(tmp_path / "shortcut", writer, place="/bin")
    with pytest.raises(ImageError, match="more than 40 links"):
        copy_folder(source, writer, place="/loop/x")
    writer.finish()
    assert listed(tmp_path / "l") == {
        "nowhere": "/", "nowhere/four": "t", "to-file": "t", "usr": "/", "usr/bin": "/", "usr/bin/one": "t",
        "usr/bin/tool": "t", "usr/three": "t", "usr/two": "t",
    }  # fmt: skip


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "l").mkdir()
    with pytest.raises(ImageError, match="could not be copied"):
        copy_folder(tmp_path / "gone", LayerWriter(tmp_path / "l"))


# Merging: the slow twin is a function over dictionaries that says what a stack shows.

NAMES = st.sampled_from(["a", "b"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
KINDS = st.sampled_from(["file", "folder", "hidden", "opaque"])
STACKS = st.lists(st.dictionaries(PATHS, KINDS, max_size=6), min_size=1, max_size=5)


def build(target: Path, entries: Mapping[str, str], below: Sequence[Path]) -> None:
    """A layer of these entries; those whose parents are no folders are left out."""
    target.mkdir()
    writer = LayerWriter(target, below=below)
    files = {path for path, kind in entries.items() if kind in ("file", "hidden")}
    for path, kind in sorted(entries.items()):
        if any(path.startswith(f"{each}/") for each in files):
            continue
        if kind == "hidden":
            writer.remove(path)
        else:
            member = folder(path) if kind != "file" else Member(path, f"{target.name}:{path}".encode())
            unpack_tar(stream(make_tar([member])), writer)
        if kind == "opaque":
            writer.make_opaque(path)
    writer.finish()


def shown(layers: Sequence[Path]) -> Mapping[str, str]:
    """What a stack shows, the bottom layer first: each entry of a layer takes away what is there and hidden by it."""
    seen: dict[str, str] = {}
    for layer in layers:
        for path, what in sorted(listed(layer).items()):
            hides = what != "/" or seen.get(path, "/") != "/"
            if hides:
                seen = {each: kind for each, kind in seen.items() if each != path and not each.startswith(f"{path}/")}
            if what != "hidden":
                seen[path] = what.removeprefix("opaque")
    return dict(sorted(seen.items()))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("stacks")


def stack(scratch: Path, entries: Sequence[Mapping[str, str]]) -> list[Path]:
    shutil.rmtree(scratch)
    scratch.mkdir()
    layers: list[Path] = []
    for number, layer in enumerate(entries):
        build(scratch / str(number), layer, layers[::-1])
        layers.append(scratch / str(number))
    return layers


@settings(max_examples=80, deadline=None)
@given(entries=STACKS, data=st.data())
def test_a_merged_stack_shows_the_same(
    scratch: Path, entries: Sequence[Mapping[str, str]], data: st.DataObject
) -> None:
    layers = stack(scratch, entries)
    (scratch / "flat").mkdir()
    merge(layers[::-1], scratch / "flat", keep_owners=False)
    flat = listed(scratch / "flat")
    assert flat == shown(layers)
    assert "hidden" not in flat.values()
    first = data.draw(st.integers(0, len(layers) - 1))
    last = data.draw(st.integers(first + 1, len(layers)))
    (scratch / "part").mkdir()
    merge(layers[first:last][::-1], scratch / "part", below=layers[:first][::-1], keep_owners=False)
    assert shown([*layers[:first], scratch / "part", *layers[last:]]) == shown(layers)


OVERLAY = """
set -e
mount -t tmpfs tmpfs "$1/upper"; mkdir "$1/upper/u" "$1/upper/w"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper/u,workdir=$1/upper/w,userxattr" "$1/merged"
cd "$1/merged"; find . -mindepth 1 \\( -type d -printf '%P=/\\n' -o -printf '%P=' -exec cat {} \\; -printf '\\n' \\)
"""


def random_stack(scratch: Path, seed: int) -> list[Path]:
    draw = random.Random(seed)
    paths = ["/".join(draw.choices("ab", k=draw.randint(1, 3))) for _ in range(12)]
    kinds = ["file", "folder", "hidden", "opaque"]
    return stack(scratch, [{draw.choice(paths): draw.choice(kinds) for _ in range(8)} for _ in range(5)])


@pytest.mark.parametrize("seed", range(8))
def test_the_kernel_shows_stacks_as_the_twin_says(tmp_path: Path, seed: int) -> None:
    for name in ("upper", "merged", "stack"):
        (tmp_path / name).mkdir()
    layers = random_stack(tmp_path / "stack", seed)
    part = tmp_path / "stack" / "part"
    part.mkdir()
    merge(layers[1:4][::-1], part, below=layers[:1], keep_owners=False)
    for each in (layers, [layers[0], part, layers[4]]):
        lowers = ":".join(map(str, each[::-1]))
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", OVERLAY, "sh", str(tmp_path), lowers],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        if "unshare" in done.stderr or "mount" in done.stderr:
            pytest.skip(f"no overlay without root here: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        assert dict(line.split("=", 1) for line in done.stdout.splitlines()) == shown(layers)
