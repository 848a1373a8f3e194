"""Abuse: agents that have been taken over, as processes of their own at the other end of a real socket.

Whatever they send, for whatever time: an operation ends, with SandboxError, and takes a bounded amount of memory.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from upspiral.errors import SandboxError
from upspiral.sandbox.base import Limits
from upspiral.sandbox.connected import ConnectedSandbox
from upspiral.sandbox.connection import Connection

BOUND_S = 60.0
"""Generous. Nothing here comes near it."""
_PREAMBLE = """
import json, os, socket, struct, sys, time
line = socket.socket(fileno=int(sys.argv[1]))
def frame(kind, number, body=b""):
    return struct.pack("!IIB", len(body), number, kind) + body
def number_of_next():
    head = b""
    while len(head) < 9:
        head += line.recv(9 - len(head)) or sys.exit()
    length, number, kind = struct.unpack("!IIB", head)
    while length:
        length -= len(line.recv(length))
    return number if kind == 2 else number_of_next()
number = number_of_next()
def flood(content):
    while True:
        line.sendall(content)
"""
HOSTILE = {
    "noise": "flood(os.urandom(1 << 20))",
    "zeros": "flood(bytes(1 << 20))",
    "the beginning of a large frame": "line.sendall(struct.pack('!IIB', 1 << 20, number, 4)); time.sleep(100)",
    "the beginning of a frame that is too large": "line.sendall(struct.pack('!IIB', (1 << 32) - 1, number, 4)); flood(bytes(1 << 20))",
    "output without end": "flood(frame(4, number, bytes(1 << 19)))",
    "empty output without end": "flood(frame(4, number) * 1000)",
    "complaints without end": "flood(frame(5, number, bytes(1 << 19)))",
    "notices without end": "flood(frame(8, number, b'{}') * 1000)",
    "output now and then": "while True: line.sendall(frame(4, number, b'x')); time.sleep(0.2)",
    "starts without end": "flood(frame(3, number) * 1000)",
    "leave to send without end": "flood(frame(7, number, bytes([255] * 4)) * 1000)",
    "ends of output without end": "flood(frame(6, number) * 1000)",
    "callers without end": "n = 1 << 31\nwhile True:\n    line.sendall(frame(2, n, b'{\"do\": \"forward\", \"port\": 80}')); n += 1",
    "operations of the past": "flood(frame(4, 0, bytes(1 << 19)))",
    "silence": "time.sleep(100)",
    "silence, and no reading": "time.sleep(100)",
    "the end": "",
    "a result of a result": "line.sendall(frame(9, number, b'{\"exit_code\": {\"exit_code\": 0}}')); time.sleep(100)",
    "a result that is too large": "line.sendall(frame(9, number, b'{\"message\": \"' + b'x' * (1 << 20) + b'\"}')); line.close()",
    "numbers that are none": "line.sendall(frame(9, number, b'{\"wall_s\": NaN, \"cpu_s\": 1e999}')); time.sleep(100)",
}  # fmt: skip
MOST_MB = 200


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upspiral.sandbox.connected.GRACE_S", 1.0)
    monkeypatch.setattr("upspiral.sandbox.connection.SILENCE_S", 2.0)
    monkeypatch.setattr("upspiral.sandbox.connection._SLOWEST_BYTES_PER_S", 16 << 20)


def with_agent(program: str, attempt: Callable[[ConnectedSandbox], Awaitable[object]]) -> None:
    """Asserts that the attempt ends with SandboxError, soon and with little memory."""

    async def check(ours: socket.socket) -> None:
        sandbox = ConnectedSandbox("hostile", await Connection.over(ours), Limits(output_bytes=1000))
        with pytest.raises(SandboxError):
            await asyncio.wait_for(attempt(sandbox), BOUND_S)
        await sandbox.stop()

    before_mb = _peak_mb()
    ours, theirs = socket.socketpair()
    with theirs:
        agent = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PREAMBLE + program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
        )
    try:
        asyncio.run(check(ours))
    finally:
        agent.kill()
        agent.wait()
    assert _peak_mb() - before_mb < MOST_MB


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_agent(name: str) -> None:
    script = "x" * (4 << 20) if "no reading" in name else "true"
    with_agent(HOSTILE[name], lambda sandbox: sandbox.exec(script, timeout_s=1.0))


@pytest.mark.parametrize("agent", ["silence", "output now and then", "output without end"])
@pytest.mark.parametrize(
    "operation", ["read", "list_files", "download", "shell", "spawn", "connect", "write", "upload"]
)
def test_a_hostile_agent_holds_up_no_operation(operation: str, agent: str) -> None:
    large = b"x" * (4 << 20)
    arguments: dict[str, tuple[object, ...]] = {
        "read": ("x",), "spawn": ("x" * (4 << 20),), "connect": (80,), "write": ("x", large), "upload": (large,),
    }  # fmt: skip
    options = {"max_bytes": 1000} if operation in ("read", "download") else {}

    async def attempt(sandbox: ConnectedSandbox) -> None:
        try:
            await getattr(sandbox, operation)(*arguments.get(operation, ()), **options)
        except OSError as error:
            raise SandboxError("download: more than was asked for") from error

    with_agent(HOSTILE[agent], attempt)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
