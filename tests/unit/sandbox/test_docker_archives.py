"""Images out of `docker save` archives and OCI layouts, written here by the book, and what is refused of them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.tar_files import Member, folder, link, make_tar
from upspiral.errors import ImageError
from upspiral.sandbox.images import ImageContent, ImageStore
from upspiral.sandbox.images import docker as docker_module
from upspiral.sandbox.images.docker import import_docker_archive
from upspiral.sandbox.images.sources import Sources

ARCHITECTURE = docker_module._architecture()
CONFIG = {"Env": ["PATH=/usr/bin:/bin", "A=b=c"], "WorkingDir": "/app", "User": "nobody", "Cmd": ["sh"]}
LAYERS = [
    make_tar([folder("etc"), Member("etc/os", b"one"), Member("etc/gone", b"x"), folder("opt"), Member("opt/old")]),
    make_tar([Member("etc/.wh.gone"), folder("opt"), Member("opt/.wh..wh..opq"), Member("opt/new", b"n")]),
    make_tar([]),
]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def sha(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def config(layers: Sequence[bytes], **others: Any) -> bytes:
    content = {"architecture": ARCHITECTURE, "os": "linux", "config": CONFIG,
               "rootfs": {"type": "layers", "diff_ids": [sha(each) for each in layers]}, **others}  # fmt: skip
    return json.dumps(content).encode()


def docker_save(layers: Sequence[bytes], tag: str = "test:1", **others: Any) -> dict[str, bytes]:
    """As old and new versions write it: a file a layer, and manifest.json."""
    files = {f"{number}/layer.tar": each for number, each in enumerate(layers)}
    entry = {"Config": "config.json", "RepoTags": [tag], "Layers": list(files)}
    return {**files, "config.json": config(layers, **others), "manifest.json": json.dumps([entry]).encode()}


def oci(layers: Sequence[bytes], compress: Callable[[bytes], bytes] = gzip.compress) -> dict[str, bytes]:
    """With an index in the index, as buildx writes it, manifests for other machines, and an attestation."""
    blobs: dict[str, bytes] = {}

    def put(content: bytes, **about: Any) -> Mapping[str, Any]:
        blobs[f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"] = content
        return {"digest": sha(content), "size": len(content), **about}

    manifest = {"config": put(config(layers)), "layers": [put(compress(each)) for each in layers]}
    ours = put(json.dumps(manifest).encode(), platform={"architecture": ARCHITECTURE, "os": "linux"})
    other = put(b"{}", platform={"architecture": "riscv64", "os": "linux"})
    windows = put(b"{  }", platform={"architecture": ARCHITECTURE, "os": "windows"})
    attestation = put(b"{ }", platform={"architecture": "unknown", "os": "unknown"})
    inner = put(json.dumps({"manifests": [windows, other, ours, attestation]}).encode())
    outer = {**inner, "mediaType": "application/vnd.oci.image.index.v1+json"}
    return {**blobs, "index.json": json.dumps({"manifests": [outer]}).encode(), "oci-layout": b"{}"}


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.write_bytes(make_tar([Member(name, content) for name, content in files.items()]))
    return path


def write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def import_archive(store: ImageStore, path: Path, tag: str = "") -> ImageContent:
    with store.hold() as hold:
        return import_docker_archive(path, store, hold, tag=tag)


@pytest.mark.parametrize("files", [docker_save(LAYERS), oci(LAYERS), oci(LAYERS, bytes)], ids=["save", "oci", "plain"])
@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_an_image_is_read(
    store: ImageStore, tmp_path: Path, files: Mapping[str, bytes], write: Callable[[Path, Mapping[str, bytes]], Path]
) -> None:
    content = import_archive(store, write(tmp_path / "saved", files))
    assert (content.env, content.workdir) == ({"PATH": "/usr/bin:/bin", "A": "b=c"}, "/app")
    top, bottom = store.lowers(content.layers)  # the empty layer is none
    assert (bottom / "etc/os").read_text() == "one"
    assert stat.S_ISCHR((top / "etc/gone").stat().st_mode)
    assert os.getxattr(top / "opt", "user.overlay.opaque") == b"y"
    assert os.listdir(top / "opt") == ["new"]


@pytest.mark.parametrize("settings", [None, {}, {"WorkingDir": ""}, {"WorkingDir": "/", "Env": None}])
def test_an_image_that_says_little(store: ImageStore, tmp_path: Path, settings: object) -> None:
    files = changed(docker_save(LAYERS), config_json=config(LAYERS, config=settings))
    content = import_archive(store, write_tar(tmp_path / "saved", files))
    assert (content.env, content.workdir) == ({}, "/work")


def test_all_ways_to_write_an_image_give_the_same(store: ImageStore, tmp_path: Path) -> None:
    found = {import_archive(store, write_tar(tmp_path / f"{number}.tar", files)).digest
             for number, files in enumerate([docker_save(LAYERS), oci(LAYERS), oci(LAYERS, bytes)])}  # fmt: skip
    assert len(found) == 1
    assert len(os.listdir(store.folder / "layers")) == 2


def test_layers_that_are_links_to_others(store: ImageStore, tmp_path: Path) -> None:
    """As `docker save` wrote a layer that occurs twice."""
    layers = [LAYERS[0], LAYERS[0]]
    files = docker_save(layers)
    members = [Member(name, content) for name, content in files.items() if name != "1/layer.tar"]
    (tmp_path / "saved.tar").write_bytes(make_tar([*members, link("1/layer.tar", "../0/layer.tar")]))
    content = import_archive(store, tmp_path / "saved.tar")
    assert content.layers[0] == content.layers[1]


def test_layers_that_are_links_to_one_another_are_refused(store: ImageStore, tmp_path: Path) -> None:
    files = docker_save(LAYERS[:1])
    members = [Member(name, content) for name, content in files.items() if name != "0/layer.tar"]
    loop = [link("0/layer.tar", "other"), link("0/other", "layer.tar")]
    (tmp_path / "saved.tar").write_bytes(make_tar([*members, *loop]))
    with pytest.raises(ImageError, match=r"has no '0/layer\.tar'"):
        import_archive(store, tmp_path / "saved.tar")


def test_one_of_several_images_is_chosen_by_its_tag(store: ImageStore, tmp_path: Path) -> None:
    first, second = docker_save(LAYERS[:1], "a:1"), docker_save(LAYERS[:2], "b:1")
    second = {f"b/{name}": content for name, content in second.items()}
    entries = [
        {"Config": "config.json", "RepoTags": ["a:1"], "Layers": ["0/layer.tar"]},
        {"Config": "b/config.json", "RepoTags": ["b:1"], "Layers": ["b/0/layer.tar", "b/1/layer.tar"]},
    ]
    path = write_tar(tmp_path / "two.tar", {**first, **second, "manifest.json": json.dumps(entries).encode()})
    assert len(import_archive(store, path, "b:1").layers) == 2
    for tag in ("", "c:1"):
        with pytest.raises(ImageError, match=r"holds 2 images \(tags: a:1, b:1\)"):
            import_archive(store, path, tag)


def changed(files: Mapping[str, bytes], **others: bytes) -> dict[str, bytes]:
    return {**files, **{name.replace("__", "/").replace("_", "."): content for name, content in others.items()}}


EVIL = [make_tar([link("a", "/tmp"), Member("a/evil", b"x")])]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (changed(docker_save(LAYERS), **{"0__layer_tar": LAYERS[1]}), "a layer is damaged: it should be sha256:"),
        (changed(docker_save(LAYERS), config_json=config(LAYERS[:2])), "3 layers, but 2"),
        (changed(docker_save(LAYERS), config_json=b"{"), "no JSON"),
        (changed(docker_save(LAYERS), manifest_json=b"[{}]"), "not that of an image"),
        (changed(docker_save(LAYERS), manifest_json=b"[]"), "holds 0 images"),
        (docker_save(LAYERS, architecture="riscv64"), "is for riscv64"),
        (
            {name: content for name, content in docker_save(LAYERS).items() if name != "1/layer.tar"},
            "has no '1/layer.tar'",
        ),
        (docker_save(EVIL), "through 'a', a link"),
        ({"some": b"file"}, "neither manifest.json nor index.json"),
        (changed(oci(LAYERS), index_json=b'{"manifests": []}'), "holds 0 images"),
        (changed(oci(LAYERS), index_json=b'{"manifests": [{"platform": 1}]}'), "not that of an image"),
        (
            changed(
                oci(LAYERS),
                index_json=b'{"manifests": [{"digest": "x"}]}',
                blobs__x=b'{"manifests": [{"digest": "x"}]}',
            ),
            "not that of an image",
        ),
        (changed(docker_save(LAYERS), config_json=config(LAYERS, rootfs={"diff_ids": 3})), "not that of an image"),
        (changed(docker_save(LAYERS), config_json=config(LAYERS, config=[1])), "not that of an image"),
        (changed(docker_save(LAYERS), config_json=config(LAYERS, config={"Env": [3]})), "not that of an image"),
        (changed(docker_save(LAYERS), config_json=config(LAYERS, config={"Env": ["A=\0"]})), "has a NUL"),
        (
            changed(docker_save(LAYERS), config_json=config(LAYERS, config={"Env": ["A=\ud800"]})),
            "not that of an image",
        ),
        (changed(docker_save(LAYERS), config_json=config(LAYERS, config={"WorkingDir": 3})), "not that of an image"),
        (changed(docker_save(LAYERS), config_json=b"[" * 100_000), "not that of an image"),
        (changed(docker_save(LAYERS), manifest_json=b'[{"Config": "config.json", "Layers": [1, 2, 3]}]'), "has no '1'"),
    ],
)
@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_a_bad_archive_is_refused_and_leaves_nothing(
    store: ImageStore,
    tmp_path: Path,
    files: Mapping[str, bytes],
    said: str,
    write: Callable[[Path, Mapping[str, bytes]], Path],
) -> None:
    with pytest.raises(ImageError, match=said):
        import_archive(store, write(tmp_path / "saved", files))
    assert os.listdir(store.folder / "work") == []
    assert not Path("/tmp/evil").exists()


def test_what_is_no_archive_is_said(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tar")
    (tmp_path / "cut.tar").write_bytes(make_tar([Member("manifest.json", b"x" * 5000)])[:700])
    for name in ("text", "gone", "cut.tar"):
        with pytest.raises(ImageError, match=r"cannot be read|no JSON"):
            import_archive(store, tmp_path / name)


# What else an image can be made on.


def get(store: ImageStore, base: str, at: Path) -> ImageContent:
    with store.hold() as hold:
        return Sources(store, hold, at).get(base)


def test_a_tar_and_a_folder_are_bases(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/file").write_text("x")
    with tarfile.open(tmp_path / "here.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "here", ".")
    of_folder, of_tar = get(store, "folder:here", tmp_path), get(store, "tar:here.tar.gz", tmp_path)
    assert of_folder == of_tar
    assert [os.listdir(path) for path in store.lowers(of_tar.layers)] == [["file"]]
    assert len(get(store, f"oci:{write_tar(tmp_path / 's', docker_save(LAYERS))}", Path("/")).layers) == 2


def test_an_image_of_the_store_is_a_base(store: ImageStore, tmp_path: Path) -> None:
    with store.hold() as hold:
        content = import_docker_archive(write_tar(tmp_path / "s", docker_save(LAYERS)), store, hold)
        store.set_name(store.add(content, hold), "one", "")
    assert get(store, "one", tmp_path) == content


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("nothing", "there is no image 'nothing'"),
        ("http:x", "is not known; use debian:RELEASE"),
        ("tar:gone", "cannot be read"),
        ("folder:gone", "there is no folder"),
        ("debian:../x", "is no release"),
    ],
)
def test_a_base_that_is_none(store: ImageStore, tmp_path: Path, base: str, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        get(store, base, tmp_path)


def test_programs_that_are_missing_are_said(store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="apt-get install debootstrap"):
        get(store, "debian:bookworm", tmp_path)
    with pytest.raises(ImageError, match="needs the docker program; or give an archive"):
        get(store, "docker:python:3.12", tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap needs root")
def test_debootstrap_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    """The program is replaced by one that takes its time: who removes the folder next must not meet it there."""
    mark = f"1000.{os.getpid()}"
    (tmp_path / "debootstrap").write_text(f"#!/bin/sh\ntouch {tmp_path}/began\nsleep {mark}\n")
    (tmp_path / "debootstrap").chmod(0o755)
    program = "import sys, pathlib; from upspiral.sandbox.images.debian import bootstrap; "
    program += f"bootstrap('bookworm', pathlib.Path({str(tmp_path)!r}))"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    maker = subprocess.Popen([sys.executable, "-c", program], env=env)
    try:
        wait_until((tmp_path / "began").exists)
    finally:
        maker.kill()
        maker.wait()
    wait_until(lambda: not any(mark in line for line in command_lines()))


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_text(errors="replace")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_docker_says_when_it_fails_is_passed_on(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is replaced by one that fails as docker does without its daemon."""
    program = tmp_path / "docker"
    program.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ImageError, match=r"python:3\.12 and could not pull it: Cannot connect to the Docker daemon"):
        get(store, "docker:python:3.12", tmp_path)
