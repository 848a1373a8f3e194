"""More sandboxes than there are descriptors for: whoever comes too late is told so, and nobody else feels it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 120.0
CROWD = """
import asyncio, contextlib, resource, sys
from pathlib import Path

resource.setrlimit(resource.RLIMIT_NOFILE, (200, 400))
from upspiral.errors import SandboxBusyError
from upspiral.sandbox.base import SandboxSpec
from upspiral.sandbox.namespace import NamespaceBackend

async def answers(sandbox):
    return (await sandbox.exec("echo alive", timeout_s=60)).stdout == b"alive\\n"

async def main(root, own_limit):
    backend = NamespaceBackend(root)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (400, 400)
    resource.setrlimit(resource.RLIMIT_NOFILE, (own_limit, 400))
    sandboxes = []
    async with contextlib.AsyncExitStack() as stack:
        try:
            while len(sandboxes) < 400:
                sandboxes.append(await stack.enter_async_context(backend.acquire(SandboxSpec())))
        except SandboxBusyError as error:
            print(error)
        print(len(sandboxes), all([await answers(each) for each in sandboxes]), (await sandboxes[0].snapshot()).how)
        for each in sandboxes[:5]:
            await each.stop()
        async with backend.acquire(SandboxSpec()) as another:
            print(await answers(another))
    await backend.stop()

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


@pytest.mark.parametrize(
    ("own_limit", "whose"), [(400, "the keeper of the sandboxes has 400"), (60, "this process has 60")]
)
def test_the_limit_is_named_and_passes(tmp_path: Path, own_limit: int, whose: str) -> None:
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    program = [sys.executable, "-c", CROWD, str(tmp_path), str(own_limit)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    complaint, crowd, after = done.stdout.splitlines()
    assert "RLIMIT_NOFILE" in complaint and whose in complaint
    count, *rest = crowd.split()
    assert int(count) > (30 if own_limit < 400 else 80 if os.geteuid() else 100)
    assert (rest, after) == (["True", "sealed"], "True")
    assert list(tmp_path.iterdir()) == []
