"""Backends by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from upspiral.errors import ConfigError, SandboxError
from upspiral.sandbox.registry import make_backend, sweep


def test_a_name_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="no-such.*namespace, process, docker, podman"):
        make_backend("no-such")


@pytest.mark.parametrize("name", ["docker", "podman"])
def test_an_engine_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=f"no program '{name}' here"):
        make_backend(name)


def test_an_engine_that_cannot_be_reached_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "docker"
    program.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SandboxError, match="Cannot connect to the Docker daemon"):
        make_backend("docker")
    sweep()  # of what there is
