"""The store of images: what is kept, what is collected, and what processes that die or work at once leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fixtures.tar_files import Member, make_tar, stream
from upspiral.errors import ImageError
from upspiral.sandbox.images import ImageContent, ImageStore
from upspiral.sandbox.images.archive import unpack_tar
from upspiral.sandbox.images.hold import Hold
from upspiral.sandbox.images.image import Image

DEADLINE_S = 60.0


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def add_layer(store: ImageStore, hold: Hold, *members: Member) -> str:
    with store.draft() as draft:
        writer = draft.writer()
        unpack_tar(stream(make_tar(members)), writer)
        writer.finish()
        return store.install(draft, hold).digest


def add_image(store: ImageStore, name: str, *contents: bytes) -> Image:
    """One layer for each content."""
    with store.hold() as hold:
        layers = tuple(add_layer(store, hold, Member(f"file-{each.decode()}", each)) for each in contents)
        return store.set_name(store.add(ImageContent(layers, {"A": "b"}, "/srv"), hold), name, "a test")


def layers_of(store: ImageStore) -> set[str]:
    return set(os.listdir(store.folder / "layers"))


def leftovers(store: ImageStore) -> Sequence[str]:
    return [f"{folder}/{name}" for folder in ("work", "holds") for name in os.listdir(store.folder / folder)]


def test_an_image_is_what_was_put_in(store: ImageStore) -> None:
    image = add_image(store, "one", b"a", b"b")
    again = ImageStore(store.folder).image("one")
    assert again == image
    assert (again.content.env, again.content.workdir, again.source) == ({"A": "b"}, "/srv", "a test")
    assert again.made_s == pytest.approx(time.time(), abs=60)
    assert store.image(image.digest).content == image.content
    with store.use("one") as used:
        assert [path.name for path in used.lowers] == ["files", "files"]
        assert [os.listdir(path) for path in used.lowers] == [["file-b"], ["file-a"]]  # the topmost first
    assert store.layer(image.layers[0]).size.content_bytes == 1
    assert leftovers(store) == []


def test_the_same_content_is_one_layer_and_one_image(store: ImageStore, tmp_path: Path) -> None:
    first, second = add_image(store, "one", b"a", b"b"), add_image(store, "two", b"a", b"b")
    assert first.digest == second.digest
    assert len(layers_of(store)) == 2
    assert add_image(ImageStore(tmp_path / "elsewhere"), "three", b"a", b"b").digest == first.digest
    assert [image.name for image in store.images()] == ["one", "two"]
    assert store.references() == dict.fromkeys(first.layers, 1)


@pytest.mark.parametrize("name", ["on", "nothing-like-it", "", "../one", "0" * 64, "a/b", "one.json"])
def test_an_image_that_is_not_there(store: ImageStore, name: str) -> None:
    add_image(store, "one", b"a")
    with pytest.raises(ImageError, match=r"did you mean one\?|upspiral image list"):
        store.use(name)
    assert leftovers(store) == []


@pytest.mark.parametrize("name", ["", "A", "a/b", "../x", "-a", "a:b", "x" * 64])
def test_a_name_that_is_none(store: ImageStore, name: str) -> None:
    image = add_image(store, "one", b"a")
    with pytest.raises(ImageError, match="no name for an image"):
        store.set_name(image, name, "")


def test_collection_keeps_what_names_and_holds_stand_on(store: ImageStore) -> None:
    one, two = add_image(store, "one", b"a", b"b"), add_image(store, "two", b"a", b"c")
    assert store.collect().layers == 0
    used = store.use("two")
    store.remove_name("two")
    assert store.references()[one.layers[0]] == 3  # two images and a hold
    assert (store.collect().images, len(layers_of(store))) == (0, 3)
    used.release()
    used.release()
    collected = store.collect()
    assert (collected.images, collected.layers, collected.content_bytes, collected.unfinished) == (1, 1, 1, 0)
    assert layers_of(store) == set(one.layers)
    with pytest.raises(ImageError):
        store.image(two.digest)
    store.remove_name("one")
    store.collect()
    assert (layers_of(store), leftovers(store)) == (set(), [])
    with pytest.raises(ImageError):
        store.remove_name("one")


def test_a_name_that_means_another_image_lets_the_first_go(store: ImageStore) -> None:
    add_image(store, "one", b"a", b"b")
    after = add_image(store, "one", b"a", b"c")
    store.collect()
    assert layers_of(store) == set(after.layers)


def test_steps_are_found_for_as_long_as_their_layer_is_there(store: ImageStore) -> None:
    with store.hold() as hold:
        layer = add_layer(store, hold, Member("a"))
        store.remember_step("0" * 64, store.layer(layer))
    with store.hold() as hold:
        assert store.find_step("0" * 64, hold) == layer
        assert store.find_step("1" * 64, hold) is None
        store.collect()
        assert layers_of(store) == {layer}
    store.collect()
    with store.hold() as hold:
        assert store.find_step("0" * 64, hold) is None
    assert os.listdir(store.folder / "steps") == []


def test_a_draft_that_fails_leaves_nothing(store: ImageStore) -> None:
    with pytest.raises(ImageError), store.hold() as hold:
        add_layer(store, hold, Member("fine"), Member("../evil"))
    assert (layers_of(store), leftovers(store)) == (set(), [])


def test_a_draft_that_is_very_deep_leaves_nothing(store: ImageStore) -> None:
    with store.hold() as hold:
        layer = add_layer(store, hold, Member("d/" * 1500 + "f"))
        with pytest.raises(ImageError):
            add_layer(store, hold, Member("d/" * 1500 + "f"), Member("../evil"))
    assert (layers_of(store), leftovers(store)) == ({layer}, [])
    store.collect()
    assert (layers_of(store), leftovers(store)) == (set(), [])


def test_an_image_without_its_layers_cannot_be_added(store: ImageStore) -> None:
    with store.hold() as hold, pytest.raises(ImageError, match=r"layer .* is not in"):
        store.add(ImageContent(("0" * 64,)), hold)


def test_a_store_that_cannot_be_written_is_an_error_of_images(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ImageError, match="no images can be kept in"):
        ImageStore(tmp_path / "file")
    add_image(store, "one", b"a")
    (store.folder / "holds").rmdir()
    with pytest.raises(ImageError, match="cannot be used"):
        store.use("one")


def test_a_damaged_description_is_said(store: ImageStore) -> None:
    image = add_image(store, "one", b"a")
    (store.folder / "images" / f"{image.digest}.json").write_text("{")
    with pytest.raises(ImageError, match=r"is damaged: .*; remove it"):
        store.image("one")


def test_a_name_whose_image_is_gone_can_be_removed(store: ImageStore) -> None:
    image = add_image(store, "one", b"a")
    (store.folder / "images" / f"{image.digest}.json").unlink()
    with pytest.raises(ImageError, match="'one' is damaged; make it again"):
        store.image("one")
    store.collect()
    assert layers_of(store) == set()
    store.remove_name("one")
    assert list(store.images()) == []


def test_the_digest_does_not_depend_on_the_umask(store: ImageStore, tmp_path: Path) -> None:
    first = add_image(store, "one", b"a")
    before = os.umask(0o077)
    try:
        second = add_image(ImageStore(tmp_path / "elsewhere"), "one", b"a")
    finally:
        os.umask(before)
    assert first.digest == second.digest


def test_a_flattened_stack_shares_its_files(store: ImageStore) -> None:
    with store.hold() as hold:
        layers = [add_layer(store, hold, Member(f"f{number}", b"x" * 1000), Member("top", b"%d" % number))
                  for number in range(5)]  # fmt: skip
        flat = store.flatten(layers, hold)
        files = store.lowers([flat.digest])[0]
        assert sorted(os.listdir(files)) == ["f0", "f1", "f2", "f3", "f4", "top"]
        assert (files / "top").read_bytes() == b"4"
        assert (files / "f0").stat().st_nlink == 2
    store.collect()
    assert layers_of(store) == set()


def test_a_deep_stack_is_flattened(store: ImageStore) -> None:
    """Deeper than a recursion of two calls a folder can be."""
    deep = "d/" * 600
    with store.hold() as hold:
        layers = [add_layer(store, hold, Member(f"{deep}{name}", b"x")) for name in ("a", "b")]
        files = store.lowers([store.flatten(layers, hold).digest])[0]
        assert sorted(os.listdir(files / deep)) == ["a", "b"]
    store.collect()
    assert layers_of(store) == set()


WORKER = """
import os, sys, time
from pathlib import Path
from upspiral.sandbox.images import ImageStore, ImageContent
store = ImageStore(Path(sys.argv[1]))
def stay():
    print('there', flush=True)
    time.sleep(60)
def put(hold, name, content):
    with store.draft() as draft:
        (draft.files / name).write_text(content)
        return store.install(draft, hold).digest
"""


def worker(store: ImageStore, program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER + program, str(store.folder), *arguments], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "program",
    [
        "with store.draft() as draft:\n (draft.files / 'a').write_text('a'); stay()",
        "with store.hold() as hold:\n put(hold, 'a', 'a'); stay()",
        "with store.hold() as hold:\n store.add(ImageContent((put(hold, 'a', 'a'),)), hold); stay()",
        "used = store.use('one'); stay()",
    ],
)
def test_what_a_killed_process_leaves_is_swept(store: ImageStore, program: str) -> None:
    image = add_image(store, "one", b"o")
    process = worker(store, program)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    before = layers_of(store)
    collected = store.collect()
    assert (collected.layers, collected.unfinished, layers_of(store)) == (
        0,
        0,
        before,
    )  # it lives, and so does its work
    assert leftovers(store) != []
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)
    store.collect()
    assert (layers_of(store), leftovers(store)) == (set(image.layers), [])
    process.stdout.close()


def test_a_crash_between_any_two_steps_of_installing_leaves_no_half_layer(store: ImageStore) -> None:
    """The process is killed at every system call that changes something; what is visible then is whole."""
    program = """
import itertools
stop_at = int(sys.argv[2]); calls = itertools.count()
def hook(event, arguments):
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (event == "open" and "w" in str(arguments[1])):
        if str(store.folder) in str(arguments[0]) and next(calls) == stop_at:
            os.kill(os.getpid(), 9)
sys.addaudithook(hook)
with store.hold() as hold:
    store.set_name(store.add(ImageContent((put(hold, 'a', 'a' * 100), put(hold, 'b', 'b'))), hold), 'one', 'x')
"""
    stop_at = exit_code = -1
    for stop_at in range(40):
        process = worker(store, program, str(stop_at))
        exit_code = process.wait(DEADLINE_S)
        for digest in layers_of(store):
            with store.hold() as hold:
                assert store.layer(digest).size.files == 1
                assert store.flatten([digest], hold).digest == digest  # the content is that of the digest
        if exit_code == 0:
            break
        assert [image.name for image in store.images()] in ([], ["one"])
        for image in store.images():
            store.use(image.name).release()
            store.remove_name(image.name)
        store.collect()
        assert (layers_of(store), leftovers(store)) == (set(), [])
    assert exit_code == 0 and stop_at > 8, "every step was tried"


def test_a_description_is_never_half_written(store: ImageStore) -> None:
    """Whoever is killed while it writes one, the old or the new one is there."""
    program = """
with store.hold() as hold:
    image = store.add(ImageContent((put(hold, 'a', 'a'),)), hold)
    store.set_name(image, 'one', '')
    print('there', flush=True)
    while True:
        store.set_name(image, 'one', 'x' * 3_000_000)
"""
    for turn in range(10):
        process = worker(store, program)
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        time.sleep(0.01 + 0.005 * turn)
        process.kill()
        process.wait(DEADLINE_S)
        process.stdout.close()
        assert len(store.image("one").source) in (0, 3_000_000)
        store.collect()
        assert leftovers(store) == []


def test_makers_users_and_collectors_at_once(store: ImageStore) -> None:
    """Makers name and unname images, use them and look for their files; collectors collect. Nobody is surprised."""
    maker = """
for turn in range(25):
    name = f"image-{sys.argv[2]}"
    with store.hold() as hold:
        layers = tuple(put(hold, 'f', f'{(turn + each) % 4}') for each in range(2))
        image = store.set_name(store.add(ImageContent(layers), hold), name, '')
        assert all(os.listdir(path) == ['f'] for path in store.lowers(layers))
    with store.use(image.digest if turn % 2 else name) as used:
        for _ in range(3):
            time.sleep(0.002)
            assert [os.listdir(path) for path in used.lowers] == [['f'], ['f']]
    store.remove_name(name)
"""
    collector = "for _ in range(60):\n store.collect(); store.references(); time.sleep(0.001)"
    processes = [worker(store, maker, str(number)) for number in range(3)]
    processes += [worker(store, collector) for _ in range(2)]
    processes += [worker(store, "for _ in range(1000):\n assert all(image.layers for image in store.images())")]
    assert [process.wait(DEADLINE_S) for process in processes] == [0] * 6
    store.collect()
    assert (layers_of(store), leftovers(store), os.listdir(store.folder / "images")) == (set(), [], [])
