"""Checkpoints: round trip, pruning, damage and a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from upspiral.errors import StoreError
from upspiral.trainer.checkpoint import check_checkpoint, latest_checkpoint, save_checkpoint, step_of


def state(content: bytes = b"1" * 1200) -> Callable[[Path], None]:
    """Writes as backends do, one file of which lies deeper."""

    def write(folder: Path) -> None:
        (folder / "state.pt").write_bytes(content)
        (folder / "ranks").mkdir()
        (folder / "ranks" / "0").write_bytes(content[::-1])

    return write


def content_of(checkpoint: Path) -> bytes:
    check_checkpoint(checkpoint)
    return (checkpoint / "state.pt").read_bytes()


def test_round_trip(tmp_path: Path) -> None:
    written = save_checkpoint(tmp_path / "new" / "folder", 7, state(b"abc"), keep=1)
    assert latest_checkpoint(tmp_path / "new" / "folder") == written
    assert step_of(written) == 7
    assert content_of(written) == b"abc"
    assert (written / "ranks" / "0").read_bytes() == b"cba"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, state(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010"]


def test_a_step_may_be_written_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, state(b"1" * 1200), keep=1)
    written = save_checkpoint(tmp_path, 3, state(b"2" * 1200), keep=1)
    assert content_of(written) == b"2" * 1200


def test_an_empty_one_is_none_and_costs_no_older_one(tmp_path: Path) -> None:
    """As ranks leave it that wrote into a folder of another machine."""
    written = save_checkpoint(tmp_path, 1, state(b"a"), keep=1)
    with pytest.raises(StoreError, match="the same one for all of its ranks"):
        save_checkpoint(tmp_path, 2, lambda _: None, keep=1)
    assert latest_checkpoint(tmp_path) == written


def test_half_written_folders_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / ".partial-step-000009").mkdir()
    (tmp_path / "step-000008").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["flip", "flip deeper", "cut", "gone", "no manifest", "bad manifest"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    written = save_checkpoint(tmp_path, 1, state(), keep=1)
    content = bytearray((written / "state.pt").read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        (written / "state.pt").write_bytes(content)
    elif damage == "flip deeper":
        (written / "ranks" / "0").write_bytes(b"2" + content[1:])
    elif damage == "gone":
        (written / "ranks" / "0").unlink()
    elif damage == "cut":
        (written / "state.pt").write_bytes(content[:-100])
    elif damage == "no manifest":
        (written / "manifest.json").unlink()
    else:
        (written / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"step-000001 is damaged.*remove that folder"):
        check_checkpoint(written)


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_checkpoint(tmp_path, 1, state(b"1" * 1200), keep=1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"only 1,000 bytes are free; free space there or lower checkpoint\.keep"):
        save_checkpoint(tmp_path, 2, state(b"2" * 1200), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert content_of(old) == b"1" * 1200


FULL_DISK_WRITER = """
import resource, signal, sys
from pathlib import Path
from upspiral.errors import StoreError
from upspiral.trainer.checkpoint import save_checkpoint
def write(size):
    return lambda folder: Path(folder, "state.pt").write_bytes(bytes(size)) and None
save_checkpoint(sys.argv[1], 1, write(4000), keep=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(sys.argv[1], 2, write(4_000_000), keep=1)
except StoreError as error:
    print(error)
"""


def test_a_write_that_fails_half_way_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK_WRITER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, timeout=120, check=True, env=environment)
    message = done.stdout.decode()
    assert f"to {tmp_path}: " in message and "earlier checkpoints are untouched" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    check_checkpoint(tmp_path / "step-000001")
