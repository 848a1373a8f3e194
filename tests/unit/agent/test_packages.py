"""The cache of agents: what is there, what is missing, and what a person is told."""

from __future__ import annotations

import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import get_args

import pytest

from upspiral.agent.launchers.registry import LAUNCHERS
from upspiral.agent.packages import MANIFEST, agent_packages, cached_agent, get_agent, require_agent
from upspiral.cli.main import run_command
from upspiral.config.models import AgentKind
from upspiral.errors import AgentError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPSPIRAL_CACHE", str(tmp_path))
    return tmp_path


def test_config_registry_and_packages_name_the_same_agents() -> None:
    table = tomllib.loads(resources.files("upspiral.agent.launchers").joinpath("packages.toml").read_text("utf-8"))
    assert set(get_args(AgentKind)) == set(LAUNCHERS) == set(table)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_version_is_exact(name: str) -> None:
    packages = agent_packages(name)
    assert bool(packages.npm) != bool(packages.pypi)
    assert all(packages.version in each for each in packages.npm[:1] or packages.pypi[:1])
    assert all(each.rpartition("@")[2][:1].isdigit() for each in packages.npm)
    assert all("==" in each for each in packages.pypi)


def test_an_agent_is_cached_only_in_the_versions_that_are_wanted(cache: Path) -> None:
    assert cached_agent("codex") is None
    with pytest.raises(AgentError, match="fetch it with `upspiral agent get codex`"):
        require_agent("codex")
    folder = cache / "agents" / f"codex-{agent_packages('codex').version}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps({"digest": "of other versions"}))
    assert cached_agent("codex") is None
    (folder / MANIFEST).write_text(json.dumps({"digest": agent_packages("codex").digest}))
    assert cached_agent("codex") == require_agent("codex") == folder
    said: list[str] = []
    assert get_agent("codex", progress=said.append) == folder
    assert "already in" in said[0]


def test_a_wrong_name_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AgentError, match="did you mean claude-code"):
        agent_packages("claude")
    assert run_command(["agent", "get", "opencod"]) == 2
    assert "did you mean opencode?" in capsys.readouterr().err


def test_without_npm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AgentError, match=r"npm is missing; install Node\.js"):
        get_agent("codex", progress=lambda line: None)
    assert list((cache / "agents").iterdir()) == []


def test_a_failed_installation_leaves_nothing(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """npm as found on the path here fails."""
    npm = cache / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho registry is away\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    with pytest.raises(AgentError, match="npm install codex failed with exit code 1: registry is away"):
        get_agent("codex", progress=lambda line: None)
    assert list((cache / "agents").iterdir()) == []


def test_the_list_says_what_is_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["agent", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == list(LAUNCHERS)
    assert all(line.endswith("[not fetched]") for line in lines)
