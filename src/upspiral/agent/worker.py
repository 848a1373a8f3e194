"""A warm worker process: imports the user's file once, then runs `async def agent(task)` for each line it is sent.

Run as `python -m upspiral.agent.worker FILE`. Speaks JSON lines. On stdin: `{"id", "task"}` starts a rollout,
`{"id", "cancel": true}` stops one, `{"id", "ping": true}` asks whether the loop turns. On the protocol stream:
`{"ready": true}`, then `{"id", "answer"}` or `{"id", "error"}` for each rollout.
What the agent prints goes to stderr, so that it cannot garble the protocol.

Imports only the standard library and the user's file: an agent must not be able to tell who trains it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

AgentFunction = Callable[[SimpleNamespace], Awaitable[Any]]
MAX_LINE_BYTES = 1 << 24


def load_agent(path: Path) -> AgentFunction:
    """Imports the user's file. Raises ImportError or AttributeError in words the user can act on."""
    spec = importlib.util.spec_from_file_location("upspiral_user_agent", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, "agent", None)
    if not inspect.iscoroutinefunction(function):
        found = "nothing of that name" if function is None else f"{function!r}"
        raise AttributeError(f"{path} must define `async def agent(task)`; found {found}")
    return function


class Worker:
    """Runs any number of rollouts at once in one event loop."""

    def __init__(self, function: AgentFunction, protocol: TextIO) -> None:
        self._function = function
        self._protocol = protocol
        self._running: dict[str, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        self._send({"ready": True})
        while line := await reader.readline():
            self._handle(json.loads(line))
        for task in self._running.values():
            task.cancel()

    def _handle(self, message: dict[str, Any]) -> None:
        rollout_id = message["id"]
        if message.get("ping"):
            self._send({"id": rollout_id, "answer": "pong"})
            return
        if message.get("cancel"):
            if task := self._running.get(rollout_id):
                task.cancel()
            return
        task = asyncio.create_task(self._rollout(rollout_id, SimpleNamespace(**message["task"])))
        self._running[rollout_id] = task
        task.add_done_callback(lambda _: self._running.pop(rollout_id, None))

    async def _rollout(self, rollout_id: str, task: SimpleNamespace) -> None:
        try:
            answer = await self._function(task)
        except asyncio.CancelledError:
            return
        except Exception as error:  # the boundary: whatever the user's agent raises is reported, never fatal
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            self._send({"id": rollout_id, "error": f"{type(error).__name__}: {error} ({where})"})
            return
        self._send({"id": rollout_id, "answer": "" if answer is None else str(answer)})

    def _send(self, message: dict[str, Any]) -> None:
        self._protocol.write(json.dumps(message) + "\n")
        self._protocol.flush()


def main() -> None:
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        function = load_agent(Path(sys.argv[1]).resolve())
    except BaseException as error:  # even SystemExit from the user's file must reach the parent as words
        protocol.write(json.dumps({"fatal": f"{type(error).__name__}: {error}"}) + "\n")
        protocol.flush()
        raise SystemExit(1) from error
    asyncio.run(Worker(function, protocol).serve())


if __name__ == "__main__":
    main()
