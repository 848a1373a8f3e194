"""The tool server through HTTP, and that a sandbox's failure is remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from starlette.testclient import TestClient

from upspiral.env.tool_server import ToolServer
from upspiral.errors import ConfigError, SandboxError, SealedRolloutError
from upspiral.sandbox.base import ExecResult, SandboxSpec
from upspiral.sandbox.fake import FakeBackend, FakeSandbox, Faults, respond_with_files, result, timeout_result
from upspiral.types import ToolSpec

NO_FAULTS = Faults()
BASH = ToolSpec("bash", "Runs a shell command.", {"type": "object", "properties": {"command": {"type": "string"}}})


def make_sandbox(script: Sequence[ExecResult] = (), faults: Faults = NO_FAULTS) -> FakeSandbox:
    return FakeSandbox(SandboxSpec(files={"a.txt": b"hello\n"}), script, respond_with_files, faults)


class Door:
    """A tool server with one open key, and a client."""

    def __init__(self, sandbox: FakeSandbox, timeout_s: float = 5.0, grace_s: float = 5.0):
        self.sandbox = sandbox
        self.server = ToolServer([BASH], grace_s=grace_s)
        self.key = self.server.open(sandbox, timeout_s=timeout_s)
        self.client = TestClient(self.server.app, headers={"Authorization": f"Bearer {self.key}"})

    def bash(self, command: object):
        return self.client.post("/tools/bash", json={"command": command})


def test_lists_tools_as_function_schemas() -> None:
    [tool] = Door(make_sandbox()).client.get("/tools").json()["tools"]
    assert tool["type"] == "function"
    assert tool["function"] == {"name": "bash", "description": BASH.description, "parameters": BASH.parameters}


def test_runs_commands_in_the_sandbox_of_the_key() -> None:
    door = Door(make_sandbox())
    assert door.bash("cat a.txt").json() == {"output": "hello", "exit_code": 0, "timed_out": False}
    assert door.bash("cat b.txt").json()["exit_code"] == 1
    assert "command not found" in door.bash("frobnicate").json()["output"]
    assert door.sandbox.commands == ["cat a.txt", "cat b.txt", "frobnicate"]
    assert door.server.failure(door.key) is None


def test_output_is_decoded_trimmed_and_limited() -> None:
    both = result("  out\n", stderr="err\n", exit_code=2)
    binary = ExecResult(0, b"\xff\x00x", b"")
    door = Door(make_sandbox([both, result("x" * 1000), timeout_result(5), binary]))
    assert door.bash("1").json() == {"output": "out\nerr", "exit_code": 2, "timed_out": False}
    assert door.bash("2").json()["output"] == "x" * 400 + "\n[output truncated]"
    assert door.bash("3").json() == {"output": "[timed out after 5 s]", "exit_code": None, "timed_out": True}
    assert door.bash("4").json()["output"] == "\ufffd\0x"


def test_turns_away_strangers_and_latecomers() -> None:
    door = Door(make_sandbox())
    for headers in ({"Authorization": "Bearer nobody"}, {"Authorization": door.key}, {"Authorization": ""}):
        assert door.client.post("/tools/bash", json={"command": "x"}, headers=headers).status_code == 401
        assert door.client.get("/tools", headers=headers).status_code == 401
    asyncio.run(door.server.close(door.key))
    asyncio.run(door.server.close(door.key))
    assert door.bash("cat a.txt").status_code == 409
    assert door.client.get("/tools").status_code == 409
    assert door.sandbox.commands == []


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"command": 3}', b'{"command": "a\\u0000b"}', b"x" * (2 << 20)])
def test_refuses_what_is_no_call(body: bytes) -> None:
    door = Door(make_sandbox())
    answer = door.client.post("/tools/bash", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert door.client.post("/tools/browser", json={}).status_code == 400
    assert door.server.failure(door.key) is None


def test_a_broken_sandbox_is_unavailable_and_remembered() -> None:
    door = Door(make_sandbox(faults=Faults(break_at=1)))
    assert door.bash("cat a.txt").status_code == 200
    assert door.bash("cat a.txt").status_code == 503
    assert door.bash("cat a.txt").status_code == 503
    assert "broke" in (door.server.failure(door.key) or "")
    asyncio.run(door.server.close(door.key))
    assert "broke" in (door.server.failure(door.key) or "")
    assert len(door.sandbox.commands) == 2


def test_a_silent_sandbox_is_given_up() -> None:
    door = Door(make_sandbox(faults=Faults(hang_at=0)), timeout_s=0.05, grace_s=0.05)
    assert door.bash("sleep").status_code == 503
    assert "did not end tool bash within 0.1 s" in (door.server.failure(door.key) or "")


def test_the_end_of_the_rollout_is_not_a_failure() -> None:
    async def check() -> None:
        sandbox = make_sandbox()
        server = ToolServer([BASH])
        key = server.open(sandbox, timeout_s=5)
        call = asyncio.create_task(server.call(key, "bash", {"command": "cat a.txt"}))
        await asyncio.sleep(0)
        await server.close(key)
        assert call.done(), "nothing may change under the verifier's eyes"
        with pytest.raises(SealedRolloutError):
            await call
        await sandbox.stop()
        assert server.failure(key) is None

    asyncio.run(check())


def test_a_tool_without_implementation_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"\['browser'\]; implemented are \['bash'\]"):
        ToolServer([ToolSpec("browser")])


def test_the_fake_backend_cannot_start_as_often_as_told() -> None:
    async def check() -> None:
        backend = FakeBackend(faults=Faults(start_failures=1))
        with pytest.raises(SandboxError):
            async with backend.acquire(SandboxSpec()):
                pass
        async with backend.acquire(SandboxSpec(files={"b": b"1"})) as sandbox:
            await sandbox.exec("echo hi > c", timeout_s=1)
            assert (await sandbox.read("c"), await sandbox.list_files()) == (b"hi\n", ["b", "c"])
        with pytest.raises(SandboxError):
            await sandbox.read("b")

    asyncio.run(check())
