"""Publications as folders: which of them stay, what others can load from them, and that none is ever half."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the [train] extra")

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures.publications import changed, received, same_bits, shared_root, weights
from tests.fixtures.tiny_model import make_model
from tests.fixtures.tiny_modules import FAMILIES, tiny_module
from upspiral.errors import DeadlineError, StoreError
from upspiral.weights import receiver as receiver_module
from upspiral.weights.names import hugging_face_tensors, hugging_face_views
from upspiral.weights.probe import measured_probe
from upspiral.weights.publication import PublisherSettings
from upspiral.weights.publisher import Publisher
from upspiral.weights.receiver import Damaged, Receiver, StaleBase, read_probe


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["disk", "shared"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path / "weights"
    else:
        with shared_root() as root:
            yield root


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_publication_is_a_hugging_face_folder(family: str, model_folder: Path, root: Path) -> None:
    module = tiny_module(family, torch.bfloat16)
    source = root.parent / f"{root.name}-source"
    try:
        module.save_pretrained(source)
        folder = Publisher(source).publish(hugging_face_views(module).items(), 1, PublisherSettings(root)).folder
        saved = load_file(source / "model.safetensors")
        assert same_bits(load_file(folder / "model.safetensors"), saved)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    finally:
        shutil.rmtree(source)
    assert loaded.dtype == torch.bfloat16
    assert same_bits(dict(loaded.named_parameters()), dict(module.named_parameters()))


def test_the_tokenizer_goes_with_it(model_folder: Path, tmp_path: Path) -> None:
    folder = Publisher(model_folder).publish(weights().items(), 1, PublisherSettings(tmp_path / "w")).folder
    assert AutoTokenizer.from_pretrained(folder)("count")["input_ids"]
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"  # the source has float32


def test_more_tensors_than_a_head_has_room_for_are_several_files(model_folder: Path, root: Path) -> None:
    """And fewer again, where files are used again."""
    publisher, settings = Publisher(model_folder), PublisherSettings(root, keep=2)
    many = {f"model.layers.{number}.with_a_long_name.weight": torch.full((3, 5), number) for number in range(1500)}
    for version, tensors in enumerate([many, many, many, weights(), weights(), many], start=1):
        folder = publisher.publish(tensors.items(), version, settings).folder
        assert same_bits(received(Receiver(), folder), tensors)
        found: dict[str, Tensor] = {}
        for path in folder.glob("*.safetensors"):
            found |= load_file(path)
        assert same_bits(found, tensors)
        index = folder / "model.safetensors.index.json"
        assert index.exists() == (tensors is many)
        if tensors is many:
            mapped: dict[str, str] = json.loads(index.read_text())["weight_map"]
            assert mapped.keys() == many.keys()
            assert all((folder / file).is_file() for file in mapped.values())


def test_a_tied_output_layer_is_named_and_read_once(model_folder: Path, tmp_path: Path) -> None:
    views = hugging_face_views(tiny_module("llama"))
    settings = PublisherSettings(tmp_path / "w", "delta")
    publisher, receiver = Publisher(model_folder), Receiver()
    for version in (1, 2, 3):
        publication = publisher.publish(views.items(), version, settings)
        assert same_bits(received(receiver, publication.folder), views)
        addresses = {name: tensor.data_ptr() for name, tensor in receiver.tensors(publication.folder)}
        assert addresses["lm_head.weight"] == addresses["model.embed_tokens.weight"]
        with torch.no_grad():
            views["lm_head.weight"][::7] += 0.01
    assert publication.num_bytes < 0.6 * views["lm_head.weight"].nbytes + 20_000


def test_the_newest_stay_and_what_they_need(model_folder: Path, root: Path) -> None:
    publisher, now = Publisher(model_folder), weights()
    present = {}
    for version, form in enumerate(["full", "full", "full", "delta", "delta", "delta", "full", "full"], start=1):
        now = changed(now, 0.02, version)
        settings = PublisherSettings(root, "delta" if form == "delta" else "full")
        base = publisher.publish(now.items(), version, settings).base
        present[version] = ([int(name[1:]) for name in names(root)], base)
    assert present == {
        1: ([1], None),
        2: ([1, 2], None),
        3: ([2, 3], None),
        4: ([3, 4], None),  # nobody kept what it would be a difference to
        5: ([4, 5], 4),
        6: ([4, 5, 6], 5),
        7: ([4, 5, 6, 7], None),
        8: ([7, 8], None),
    }


def test_a_chain_that_weighs_as_much_as_the_weights_ends(model_folder: Path, tmp_path: Path) -> None:
    """Or a new engine would have to read ever more."""
    publisher, now = Publisher(model_folder), {"a": torch.randn(100_000, generator=torch.Generator().manual_seed(0))}
    found = []
    for version in range(1, 12):
        found.append(publisher.publish(now.items(), version, PublisherSettings(tmp_path, "delta")))
        now = changed(now, 0.2, version)
    whole = [each.version for each in found if each.base is None]
    assert whole == [1, 7]  # 5 differences of a quarter


def test_shared_memory_is_used_again_but_never_under_a_reader(model_folder: Path) -> None:
    with shared_root() as root:
        publisher, settings = Publisher(model_folder), PublisherSettings(root)
        files, versions = [], {version: weights(version) for version in range(1, 7)}
        receiver = Receiver()
        for version in (1, 2, 3):
            folder = publisher.publish(versions[version].items(), version, settings).folder
            files.append((folder / "model.safetensors").stat().st_ino)
        assert files[2] == files[0] != files[1]
        with receiver.reading(root / "v000002") as tensors:
            name, tensor = next(tensors)
            for version in (4, 5):
                publisher.publish(versions[version].items(), version, settings)
            assert same_bits({name: tensor, **dict(tensors)}, versions[2])
        with pytest.raises(Damaged, match=r"no publication .*v000002 \(any more\)"):
            received(receiver, root / "v000002")
        assert same_bits(received(receiver, root / "v000005"), versions[5])
        assert names(root) == ["v000004", "v000005"]


def test_a_version_that_is_being_replaced_is_not_read(model_folder: Path) -> None:
    with shared_root() as root:
        folder = Publisher(model_folder).publish(weights().items(), 1, PublisherSettings(root)).folder
        with (folder / "manifest.json").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(Damaged, match="it is being replaced"):
                received(Receiver(), folder)
        received(Receiver(), folder)


def test_the_same_version_again_takes_its_place(model_folder: Path, root: Path) -> None:
    """As after an engine said that it lacks the base: who has the difference and who has the whole can go on alike."""
    publisher, settings = Publisher(model_folder), PublisherSettings(root, "delta")
    first = weights()
    second, third = changed(first, 0.02, 1), changed(first, 0.02, 2)
    early, late = Receiver(), Receiver()
    received(early, publisher.publish(first.items(), 1, settings).folder)
    received(early, publisher.publish(second.items(), 2, settings).folder)
    whole = publisher.publish(second.items(), 2, PublisherSettings(root, "full"))
    assert whole.base is None
    assert same_bits(received(late, whole.folder), second)
    change = publisher.publish(third.items(), 3, settings)
    assert change.base == 2
    assert same_bits(received(late, change.folder), third)
    (whole.folder / "manifest.json").rename(root / "hidden")
    assert same_bits(received(early, change.folder), third)  # needs no whole one
    with pytest.raises(StaleBase):
        received(Receiver(), change.folder)


def test_a_publisher_that_starts_again_begins_whole_and_clears_up(model_folder: Path, root: Path) -> None:
    settings, now = PublisherSettings(root, "delta"), weights()
    earlier = Publisher(model_folder)
    for version in (6, 7, 8):
        now = changed(now, 0.02, version)
        earlier.publish(now.items(), version, settings)
    (root / "v000009.partial").mkdir()
    again = Publisher(model_folder)  # from the checkpoint of step 6
    publication = again.publish(now.items(), 7, settings)
    assert publication.base is None
    assert same_bits(received(Receiver(), publication.folder), now)
    assert again.publish(changed(now, 0.02, 1).items(), 8, settings).base == 7
    assert names(root) == ["v000007", "v000008"]


@pytest.mark.parametrize("error", [RuntimeError("a rank died"), DeadlineError("a rank died")])
def test_a_publication_that_fails_leaves_nothing_and_the_next_is_whole(
    error: Exception, model_folder: Path, root: Path
) -> None:
    publisher, settings, now = Publisher(model_folder), PublisherSettings(root, "delta"), weights()
    publisher.publish(now.items(), 1, settings)

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield next(iter(changed(now, 0.5, 3).items()))
        raise error

    with pytest.raises(type(error), match="a rank died"):
        publisher.publish(broken(), 2, settings)
    assert names(root) == ["v000001"]
    publication = publisher.publish(now.items(), 2, settings)
    assert publication.base is None
    assert same_bits(received(Receiver(), publication.folder), now)


def test_a_root_that_cannot_be_written_says_so(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"version 4 could not be published in .*file: .*free space"):
        Publisher(model_folder).publish(weights().items(), 4, PublisherSettings(tmp_path / "file"))


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(model_folder: Path, tmp_path: Path) -> None:
    """A page of shared memory that is not to be had would kill who touches it."""
    program = """
import resource, signal, sys
from pathlib import Path
import torch
from upspiral.errors import DeadlineError, StoreError
from upspiral.weights import receiver as receiver_module
from upspiral.weights.publication import PublisherSettings
from upspiral.weights.publisher import Publisher
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))
tensors = {"a": torch.zeros(5 << 20), "b": torch.zeros(5 << 20)}
try:
    Publisher(Path(sys.argv[1])).publish(tensors.items(), 1, PublisherSettings(Path(sys.argv[2])))
except StoreError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_folder), str(tmp_path / "w")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "could not be published" in done.stdout
    assert names(tmp_path / "w") == []


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from tests.fixtures.publications import changed, weights
from upspiral.weights.publication import PublisherSettings
from upspiral.weights.publisher import Publisher
import torch
torch.set_num_threads(1)
now = {f"{number}": torch.randn(200, 1000) for number in range(20)}
for trial in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        publisher = Publisher(Path(sys.argv[1]))
        for version in range(1000 * trial, 1000 * trial + 1000):
            now["0"][version % 200] += 1
            form = "full" if version % 3 else "delta"
            publisher.publish(now.items(), version, PublisherSettings(Path(sys.argv[2]), form))
    time.sleep(random.Random(trial).uniform(0.01, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(trial, flush=True)
    sys.stdin.readline()
"""


def test_a_killed_publisher_leaves_only_whole_versions(model_folder: Path, root: Path) -> None:
    trials = 12
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(model_folder), str(root), str(trials)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = partial = 0
    assert child.stdin and child.stdout
    try:
        for line in child.stdout:
            partial += any(name.endswith(".partial") for name in names(root))
            for name in names(root):
                if not name.endswith(".partial"):
                    assert len(received(Receiver(), root / name)) == 20
                    seen += 1
            print(line, end="", file=child.stdin, flush=True)  # a second line would let two publishers go
    finally:
        child.kill()
        child.wait(30)
    assert seen >= trials
    assert partial  # some were killed while they wrote


def test_the_probe_is_that_of_the_weights(model_folder: Path, tmp_path: Path) -> None:
    module = tiny_module("qwen3")
    publisher, settings = Publisher(model_folder), PublisherSettings(tmp_path / "w")
    probe = measured_probe(module)
    views = hugging_face_views(module)
    found = read_probe(publisher.publish(views.items(), 1, settings, probe=probe).folder)
    assert found is not None
    ids = found["token_ids"]
    with torch.no_grad():
        expected = module(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert len(found["logprobs"]) == len(ids) - 1
    for row, token, logprob in zip(expected, ids[1:], found["logprobs"], strict=True):
        assert logprob == pytest.approx(float(row[token]), abs=1e-5)
    for version in (2, 3):
        assert read_probe(publisher.publish(views.items(), version, settings).folder) is None


def test_the_receiver_stands_alone(model_folder: Path, tmp_path: Path) -> None:
    """A copy of the one file reads in an environment without upspiral."""
    folder = Publisher(model_folder).publish(weights().items(), 1, PublisherSettings(tmp_path / "w")).folder
    shutil.copyfile(receiver_module.__file__, tmp_path / "receiver.py")
    program = """
import sys
sys.path = [path for path in sys.path if path.endswith("site-packages") or "python3" in path] + [sys.argv[1]]
sys.modules["upspiral"] = None
from pathlib import Path
from receiver import Receiver
print(sorted(name for name, _ in Receiver().tensors(Path(sys.argv[2]))))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(tmp_path), str(folder)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(sorted(weights()))


def test_tensors_are_taken_one_at_a_time(model_folder: Path, tmp_path: Path) -> None:
    """Nobody holds the one before while the next is gathered."""
    alive: list[Any] = []

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for number in range(5):
            assert not any(each() is not None for each in alive)
            tensor = torch.zeros(1000)
            alive.append(weakref.ref(tensor))
            pair = (str(number), tensor)
            del tensor
            yield pair
            del pair

    tensors = hugging_face_tensors(gathered(), tied=False)
    Publisher(model_folder).publish(tensors, 1, PublisherSettings(tmp_path / "w"))
    assert len(alive) == 5
