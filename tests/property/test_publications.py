"""Laws of published weights: they arrive to the bit, whole or as differences, and no damage goes unnoticed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the [train] extra")

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fixtures.publications import received, same_bits
from tests.fixtures.tiny_model import make_tokenizer
from upspiral.weights.difference import difference
from upspiral.weights.publication import Probe, PublisherSettings
from upspiral.weights.publisher import Publisher
from upspiral.weights.receiver import BITS, Damaged, Receiver, StaleBase, checksum, read_probe

DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Of any shape, none and one element included, and of any bits: infinities and all kinds of NaN."""
    count = draw(st.integers(1, 6))
    found = {}
    for number in range(count):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 40), max_size=3))
        found[f"layer.{number}.weight"] = _of_bits(draw(st.integers(0, 2**32 - 1)), dtype, shape)
    return found


def _of_bits(seed: int, dtype: Any, shape: list[int]) -> Tensor:
    size = int(np.prod(shape, dtype=np.int64))
    data = np.random.default_rng(seed).integers(0, 256, size * dtype.itemsize, np.uint8)
    return torch.from_numpy(data.view(BITS[dtype.itemsize])).view(dtype).reshape(shape)


def _moved(tensor: Tensor, share: float, seed: int) -> Tensor:
    """Other bits in about a share of the elements."""
    bits = BITS[tensor.element_size()]
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy().view(bits)
    random = np.random.default_rng(seed)
    flat ^= np.where(random.random(len(flat)) < share, random.integers(1, 200, len(flat)), 0).astype(bits)
    return torch.from_numpy(flat).view(tensor.dtype).reshape(tensor.shape)


@contextmanager
def _places(*, shared: bool) -> Iterator[tuple[Publisher, Path]]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if shared else None) as temporary:
        folder = make_tokenizer(Path(temporary) / "model")
        (folder / "config.json").write_text('{"torch_dtype": "float16"}')
        yield Publisher(folder), Path(temporary) / "weights"


@settings(max_examples=40, deadline=None)
@given(first=tensors(), shared=st.booleans())
def test_what_is_published_arrives_to_the_bit(first: dict[str, Tensor], shared: bool) -> None:
    with _places(shared=shared) as (publisher, root):
        publication = publisher.publish(first.items(), 3, PublisherSettings(root))
        assert same_bits(received(Receiver(), publication.folder), first)


@settings(max_examples=40, deadline=None)
@given(
    first=tensors(),
    shares=st.lists(st.sampled_from([0.0, 0.001, 0.02, 0.3, 1.0]), min_size=1, max_size=5),
    forms=st.lists(st.sampled_from(["full", "delta", "delta"]), min_size=6, max_size=6),
    skipped=st.sets(st.integers(1, 5)),
)
def test_a_chain_of_differences_is_the_last_version(
    first: dict[str, Tensor], shares: list[float], forms: list[str], skipped: set[int]
) -> None:
    """Also for who reads not all of them, and for who comes late."""
    with _places(shared=False) as (publisher, root):
        now, faithful, skipping = first, Receiver(), Receiver()
        for version, share in enumerate([0.0, *shares]):
            now = {name: _moved(tensor, share, version) for name, tensor in now.items()}
            form = "full" if forms[version] == "full" else "delta"
            folder = publisher.publish(now.items(), version, PublisherSettings(root, form)).folder
            for receiver in [faithful, *([] if version in skipped else [skipping]), Receiver()]:
                assert same_bits(received(receiver, folder), now)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 70_000), share=st.floats(0, 0.4), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_difference_is_smaller_than_what_it_is_of(size: int, share: float, seed: int, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([np.uint16, np.uint32]))
    random = np.random.default_rng(seed)
    old = random.integers(0, 60_000, size, bits)
    new = np.where(random.random(size) < share, old + bits(1), old).astype(bits)
    found = difference(old, new)
    changed = int((old != new).sum())
    if found is None:
        assert changed * (new.itemsize + 1) > 0.9 * new.nbytes
    else:
        # One element of each block of 128 may be sent although it did not change.
        assert len(found) <= min(new.nbytes, (changed + size // 128 + 1) * (new.itemsize + 1))
        assert bool(len(found)) == bool(changed)


@settings(max_examples=150, deadline=None)
@given(difference_too=st.booleans(), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
def test_no_damaged_byte_goes_unnoticed(difference_too: bool, where: float, bit: int, data: st.DataObject) -> None:
    """Any byte of any file that a receiver reads."""
    with _places(shared=False) as (publisher, root):
        first = {"a": _of_bits(1, torch.bfloat16, [90, 64]), "b": _of_bits(2, torch.float32, [7])}
        version = 1
        folder = publisher.publish(first.items(), version, PublisherSettings(root, "delta"), probe=PROBE).folder
        receiver = Receiver()
        received(receiver, folder)
        if difference_too:
            second = {name: _moved(tensor, 0.1, 5) for name, tensor in first.items()}
            folder = publisher.publish(second.items(), 2, PublisherSettings(root, "delta"), probe=PROBE).folder
        weights = "changes.bin" if difference_too else "model.safetensors"
        path = folder / data.draw(st.sampled_from([weights, "manifest.json", "probe.json"]))
        content = bytearray(path.read_bytes())
        content[int(where * len(content))] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(Damaged, match=r"not what was written|does not fit|too short"):
            received(receiver, folder)
            read_probe(folder)


PROBE = Probe([3, 1, 2], [-0.5, -2.25])


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 60_000), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_a_checksum_notices_what_is_likely_to_happen(size: int, seed: int, data: st.DataObject) -> None:
    content = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    expected, target = checksum(content), np.zeros(size, np.uint8)
    assert checksum(content, into=target) == expected
    assert np.array_equal(content, target)
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, 4096))
    lost = content.copy()
    lost[start : start + length] = 0  # a page that was never written
    assert (checksum(lost) == expected) == np.array_equal(lost, content)
    assert checksum(content[:-1]) != expected  # a byte less
    assert checksum(np.append(content, np.uint8(0))) != expected  # a zero more
    if size >= 8192:  # pages that changed places
        pages = content[: size // 4096 * 4096].reshape(-1, 4096)
        one, other = data.draw(st.lists(st.integers(0, len(pages) - 1), min_size=2, max_size=2, unique=True))
        pages[[one, other]] = pages[[other, one]]
        assert checksum(content) != expected


@settings(max_examples=20, deadline=None)
@given(share=st.sampled_from([0.01, 0.2]), hold=st.booleans())
def test_a_difference_to_something_else_says_so(share: float, hold: bool) -> None:
    """To a version that is gone, and to another one of the same number; what comes whole helps."""
    with _places(shared=False) as (publisher, root):
        settings = PublisherSettings(root, "delta")
        first = {"a": _of_bits(1, torch.bfloat16, [90, 64])}
        other = {"a": _of_bits(9, torch.bfloat16, [90, 64])}
        second = {name: _moved(tensor, share, 5) for name, tensor in first.items()}
        whole = publisher.publish(first.items(), 1, settings)
        change = publisher.publish(second.items(), 2, settings)
        receiver = Receiver()
        if hold:  # another trainer's version 1, and the difference to it
            stranger = Publisher(root.parent / "model")
            elsewhere = PublisherSettings(root.parent / "other", "delta")
            for version in (0, 1):
                received(receiver, stranger.publish(other.items(), version, elsewhere).folder)
        shutil.rmtree(whole.folder)
        with pytest.raises(StaleBase, match="difference to version 1, which is not here"):
            received(receiver, change.folder)
        shutil.copytree(change.folder, root / "v000001")
        with pytest.raises(StaleBase, match="another version 1 than"):
            received(receiver, change.folder)
        publisher.refresh()
        again = publisher.publish(second.items(), 2, settings)
        assert again.base is None
        assert same_bits(received(receiver, again.folder), second)
