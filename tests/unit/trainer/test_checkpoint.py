"""Checkpoints: round trip, pruning, damage and a full disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from upspiral.errors import StoreError
from upspiral.trainer.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, step_of


def state(value: float = 1.0) -> dict[str, Any]:
    return {"trainer": {"masters": [torch.full((100,), value), torch.ones(3).bfloat16()]}, "step": 7, "name": "x"}


def test_round_trip(tmp_path: Path) -> None:
    written = save_checkpoint(tmp_path / "new" / "folder", 7, state(), keep=1)
    assert latest_checkpoint(tmp_path / "new" / "folder") == written
    assert step_of(written) == 7
    read = load_checkpoint(written)
    assert (read["step"], read["name"]) == (7, "x")
    assert all(
        torch.equal(a, b) for a, b in zip(read["trainer"]["masters"], state()["trainer"]["masters"], strict=True)
    )


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, state(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000010"]


def test_a_step_may_be_written_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, state(1.0), keep=1)
    written = save_checkpoint(tmp_path, 3, state(2.0), keep=1)
    assert load_checkpoint(written)["trainer"]["masters"][0][0] == 2.0


def test_half_written_folders_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / ".partial-step-000009").mkdir()
    (tmp_path / "step-000008").mkdir()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "bad manifest"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    written = save_checkpoint(tmp_path, 1, state(), keep=1)
    content = bytearray((written / "state.pt").read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        (written / "state.pt").write_bytes(content)
    elif damage == "cut":
        (written / "state.pt").write_bytes(content[:-100])
    elif damage == "no manifest":
        (written / "manifest.json").unlink()
    else:
        (written / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"step-000001 is damaged.*remove that folder"):
        load_checkpoint(written)


def test_too_little_space_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_checkpoint(tmp_path, 1, state(1.0), keep=1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match=r"only 1,000 bytes are free; free space there or lower checkpoint\.keep"):
        save_checkpoint(tmp_path, 2, state(2.0), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert load_checkpoint(old)["trainer"]["masters"][0][0] == 1.0


FULL_DISK_WRITER = """
import resource, signal, sys, torch
from upspiral.errors import StoreError
from upspiral.trainer.checkpoint import save_checkpoint
save_checkpoint(sys.argv[1], 1, {"x": torch.ones(100)}, keep=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(sys.argv[1], 2, {"x": torch.ones(1_000_000)}, keep=1)
except StoreError as error:
    print(error)
"""


def test_a_write_that_fails_half_way_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK_WRITER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, timeout=120, check=True, env=environment)
    message = done.stdout.decode()
    assert str(tmp_path) in message
    assert "about 4,00" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert torch.equal(load_checkpoint(tmp_path / "step-000001")["x"], torch.ones(100))
