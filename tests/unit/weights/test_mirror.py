"""Publications brought to another machine: the same weights there, the same folders, and no damage unnoticed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the [train] extra")

from tests.fixtures.publications import Weights, changed, received, same_bits, shared_root, weights
from tests.fixtures.tiny_model import make_model
from upspiral.errors import StoreError
from upspiral.weights import mirror as mirror_module
from upspiral.weights import safetensors_files
from upspiral.weights.mirror import Mirror, files_of
from upspiral.weights.publication import Publication, PublisherSettings
from upspiral.weights.publisher import Publisher
from upspiral.weights.receiver import Bytes, Damaged, Receiver, StaleBase
from upspiral.weights.shared_folder import shared_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def roots() -> Iterator[tuple[Path, Path]]:
    """The publisher's and the mirror's."""
    with shared_root() as here, shared_root() as there:
        yield here, there


@pytest.fixture(autouse=True)
def pieces_smaller_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "PIECE_BYTES", 10_000)


def sent(publication: Publication) -> dict[str, list[Bytes]]:
    """Its files as they come over a network."""
    return {name: [piece.copy() for piece in pieces] for name, pieces in files_of(publication.folder)}


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def steps(count: int) -> Iterator[tuple[int, Weights]]:
    now = weights()
    for version in range(count):
        yield version, now
        now = changed(now, 0.1, seed=version)


@pytest.mark.parametrize("form", ["full", "delta"])
@pytest.mark.parametrize("many_files", [False, True])
def test_it_has_the_weights_and_the_folders_of_the_publisher(
    form: str, many_files: bool, model_folder: Path, roots: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if many_files:
        monkeypatch.setattr(safetensors_files, "HEAD_BYTES", 160)
    settings = PublisherSettings(roots[0], form=form)  # type: ignore[arg-type]
    publisher, mirror, receiver = Publisher(model_folder), Mirror(roots[1]), Receiver()
    for version, now in steps(7):
        if version == 4:
            publisher.refresh()
        publication = publisher.publish(now.items(), version, settings)
        assert mirror.find(publication) is None
        here = mirror.add(publication, sent(publication))
        assert here.folder.parent == roots[1] and (here.version, here.base) == (version, publication.base)
        assert mirror.find(publication) == here
        assert same_bits(received(receiver, here.folder), now)
        assert names(roots[1]) == names(roots[0])
        assert same_bits(received(Receiver(), here.folder), now), "who starts late needs what it is a difference to"


def test_whose_base_never_came_asks_for_the_whole(model_folder: Path, roots: tuple[Path, Path]) -> None:
    settings = PublisherSettings(roots[0], form="delta")
    publisher, mirror = Publisher(model_folder), Mirror(roots[1])
    publications = [publisher.publish(now.items(), version, settings) for version, now in steps(2)]
    here = mirror.add(publications[1], sent(publications[1]))
    with pytest.raises(StaleBase):
        received(Receiver(), here.folder)
    publisher.refresh()
    now = dict(steps(2))[1]
    whole = publisher.publish(now.items(), 1, settings)
    assert whole != publications[1] and mirror.find(whole) is None
    assert same_bits(received(Receiver(), mirror.add(whole, sent(whole)).folder), now)


def test_a_byte_that_changed_on_the_way_is_noticed(model_folder: Path, roots: tuple[Path, Path]) -> None:
    publication = Publisher(model_folder).publish(weights().items(), 3, PublisherSettings(roots[0]))
    files = sent(publication)
    files["model.safetensors"][-1][-1] ^= 1
    here = Mirror(roots[1]).add(publication, files)
    with pytest.raises(Damaged, match="is not what was written"):
        received(Receiver(), here.folder)


def test_what_broke_off_leaves_nothing(model_folder: Path, roots: tuple[Path, Path]) -> None:
    publication = Publisher(model_folder).publish(weights().items(), 3, PublisherSettings(roots[0]))
    files, mirror = sent(publication), Mirror(roots[1])

    def broken() -> Iterator[Bytes]:
        yield np.zeros(5, np.uint8)
        raise OSError("no space")

    with pytest.raises(StoreError, match=r"version 3 .*no space"):
        mirror.add(publication, {**files, "model.safetensors": broken()})
    assert names(roots[1]) == []
    assert same_bits(received(Receiver(), mirror.add(publication, files).folder), weights())


def test_a_version_that_is_gone_is_not_sent(model_folder: Path, roots: tuple[Path, Path]) -> None:
    publication = Publisher(model_folder).publish(weights().items(), 3, PublisherSettings(roots[0]))
    gone = publication.folder.rename(roots[0] / "elsewhere").with_name("v000003")
    with pytest.raises(Damaged, match="there is no publication"):
        list(files_of(gone))


def test_a_shared_folder_goes_with_its_process() -> None:
    program = """
import sys
from pathlib import Path
from upspiral.weights.shared_folder import shared_folder
with shared_folder() as folder:
    (folder / "file").write_text("weights")
    print(folder, flush=True)
    sys.stdin.readline()
"""
    for killed in (False, True):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin and process.stdout
        folder = Path(process.stdout.readline().strip())
        assert (folder / "file").exists()
        process.kill() if killed else process.stdin.close()
        process.wait(30)
        deadline = time.monotonic() + 20 * killed
        while folder.exists():
            assert time.monotonic() < deadline, f"{folder} is still there"
            time.sleep(0.05)


def test_a_shared_folder_goes_when_its_block_ends() -> None:
    with shared_folder() as folder:
        assert folder.is_dir()
    assert not folder.exists()
