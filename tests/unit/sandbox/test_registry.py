"""Backends by name."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.unit.sandbox.live_server import ALICE, live_server
from upspiral.config.models import SandboxConfig
from upspiral.errors import ConfigError, SandboxError
from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.egress import EgressRecord
from upspiral.sandbox.egress.log_file import EgressFile
from upspiral.sandbox.fake import FakeBackend
from upspiral.sandbox.registry import TOKEN_VARIABLE, make_backend, open_backend, sweep


def test_a_name_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no-such.*namespace, process, docker, podman"):
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


def test_a_run_has_the_backend_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, ALICE)

    async def isolation(config: SandboxConfig) -> str:
        backend = await open_backend(config)
        try:
            async with backend.acquire(SandboxSpec()):
                return backend.capabilities.isolation
        finally:
            await backend.stop()

    async def check() -> None:
        async with live_server(FakeBackend()) as live:
            remote = SandboxConfig(backend="remote", url=live.url)
            assert await isolation(remote) == FakeBackend().capabilities.isolation
        assert await isolation(SandboxConfig(backend="process", trust_commands=True)) == "process"

    asyncio.run(asyncio.wait_for(check(), 60.0))


def test_a_server_without_a_token_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=f"sandbox.url.*wants a token.*{TOKEN_VARIABLE}"):
        asyncio.run(open_backend(SandboxConfig(backend="remote", url="http://127.0.0.1:1")))


def test_connections_out_are_written_with_the_rollout(tmp_path: Path) -> None:
    log = EgressFile(tmp_path / "egress.jsonl")
    for host in ("pypi.org", "evil.example"):
        log(EgressRecord(1.0, host, 443, "", host == "pypi.org", "", 10, 20, 0.5, {"rollout": "r7"}))
    lines = [json.loads(line) for line in (tmp_path / "egress.jsonl").read_text().splitlines()]
    assert [(line["host"], line["allowed"], line["labels"]) for line in lines] == [
        ("pypi.org", True, {"rollout": "r7"}),
        ("evil.example", False, {"rollout": "r7"}),
    ]
