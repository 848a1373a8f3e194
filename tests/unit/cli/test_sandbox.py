"""`upspiral sandbox`: what it refuses, what it lists, what it removes. The server itself is in tests/unit/sandbox/."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.sandbox.live_server import ALICE, server_process
from upspiral.cli.main import run_command
from upspiral.sandbox.registry import TOKEN_VARIABLE


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    yield


@pytest.mark.parametrize(
    ("arguments", "token", "word"),
    [
        (["--host", "0.0.0.0"], "", "--tenants FILE"),
        (["--backend", "cloud"], "", "choose one of namespace, process"),
        (["--tenants", "/nowhere/tenants.toml"], "", "cannot be read"),
        ([], "short", "at least 16"),
        (["--heartbeat-s", "0"], "", "--heartbeat-s 0 would end"),
        (["--starting", "0"], "", "starting = 0"),
    ],
)
def test_serve_says_what_is_missing(
    arguments: list[str], token: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    assert run_command(["sandbox", "serve", "--port", "0", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["sandbox", "list"]) == 2
    assert TOKEN_VARIABLE in capsys.readouterr().err
    monkeypatch.setenv(TOKEN_VARIABLE, ALICE)
    with server_process("--backend", "process") as (_, url):
        assert run_command(["sandbox", "list", "--url", url]) == 0
        printed = capsys.readouterr()
        assert printed.out == "" and f"no sandboxes at {url}" in printed.err
        monkeypatch.setenv(TOKEN_VARIABLE, ALICE + "x")
        assert run_command(["sandbox", "list", "--url", url]) == 2
        assert "no tenant has this token" in capsys.readouterr().err


def test_a_list_of_a_server_that_is_not_there_is_an_answer_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, ALICE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    began_s = time.monotonic()
    assert run_command(["sandbox", "list", "--url", f"http://127.0.0.1:{port}"]) == 2
    assert time.monotonic() - began_s < 15
    assert "does it run there (`upspiral sandbox serve`)?" in capsys.readouterr().err
    assert run_command(["sandbox", "list", "--url", f"127.0.0.1:{port}"]) == 2
    assert "begins with http:// or https://" in capsys.readouterr().err


def test_serve_on_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert run_command(["sandbox", "serve", "--port", str(listener.getsockname()[1])]) == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_gc_removes_what_a_killed_process_left(capsys: pytest.CaptureFixture[str]) -> None:
    with server_process("--backend", "process") as (server, _):
        own = [path for path in Path("/dev/shm").glob("upspiral*") if f"-{server.pid}-" in path.name]
        assert own, "the process backend has a folder that names its owner"
        # What is in use stays.
        assert run_command(["sandbox", "gc"]) == 0
        assert all(path.exists() for path in own)
        server.kill()
        server.wait()
        assert run_command(["sandbox", "gc"]) == 0
        assert not any(path.exists() for path in own)
        assert str(own[0]) in capsys.readouterr().out


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["sandbox", "--help"]) == 0
    assert {"serve", "list", "gc"} <= set(capsys.readouterr().out.split())
