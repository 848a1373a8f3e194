"""`upspiral image` on a store of its own. Building is tested where sandboxes are."""

from __future__ import annotations

from pathlib import Path

import pytest

from upspiral.cli.main import run_command
from upspiral.sandbox.images import Image, ImageContent, ImageStore


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    monkeypatch.setenv("UPSPIRAL_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    store = ImageStore()
    assert store.folder == tmp_path / "images"
    with store.hold() as hold, store.draft() as draft:
        (draft.files / "file").write_bytes(b"x" * 2_000_000)
        layer = store.install(draft, hold)
        return store.set_name(store.add(ImageContent((layer.digest,), {"A": "b"}), hold), "one", "a test [/of/a/path]")


def test_images_are_listed_shown_and_removed(image: Image, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["image", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()[1]
    assert listed.split()[:4] == ["one", image.digest[:12], "2", "1"] and "a test [/of/a/path]" in listed
    assert run_command(["image", "show", "one"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        f"digest   {image.digest}",
        "from a test",
        "workdir  /work",
        "env      A=b",
        "2.0 MB, 1 files, 1 stand",
    ):
        assert expected in shown
    assert run_command(["image", "gc"]) == 0
    assert "removed 0 layers" in capsys.readouterr().out
    assert run_command(["image", "remove", "one"]) == 0
    assert run_command(["image", "gc"]) == 0
    assert "removed 1 layers (2.0 MB), 1 images without a name" in capsys.readouterr().out
    assert list(ImageStore().images()) == []
    assert run_command(["image", "list"]) == 0
    assert "there are no images; `upspiral image build" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "two"], "there is no image 'two'"),
        (["show", "on"], "did you mean one?"),
        (["remove", "two"], "no image has the name 'two'"),
        (["remove"], "which images?"),
        (["build", "gone.toml"], "no recipe at gone.toml"),
        (["build", "gone.toml", "--certificates", "gone.pem"], "no file of certificates gone.pem"),
        (["build", "gone.toml", "--allow-network", "10.0.0.0/33"], "allowed network: "),
    ],
)
def test_an_error_is_one_line(
    image: Image, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run_command(["image", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
