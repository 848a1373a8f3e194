"""Commands: `exec` runs one to its end and gives its output with its result, `spawn` streams both ways meanwhile."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

from . import frames
from .launch import MissingBashError, file_of
from .loop import WRITABLE
from .operations import Agent, Operation
from .running import Running, not_started


class Kept:
    """The head of a stream; the rest is counted."""

    def __init__(self, limit: int):
        self.content = bytearray()
        self.dropped = 0
        self._limit = limit

    def take(self, content: memoryview) -> None:
        kept = min(len(content), self._limit - len(self.content))
        if kept:
            self.content += content[:kept]
        self.dropped += len(content) - kept


class Run:
    """One run of a command. Executions of the same op_id share it."""

    def __init__(self, agent: Agent, request: dict[str, Any]):
        limit = request["output_bytes"] if request["output_bytes"] is not None else agent.settings.output_bytes
        self.kept = {frames.DATA: Kept(limit), frames.ERRORS: Kept(limit)}
        self.result: dict[str, Any] | None = None
        self._agent = agent
        self.waiting: list[Execution] = []
        self._running = Running(
            agent, lambda kind, content: self.kept[kind].take(content), lambda: 1 << 20, self._ended
        )

    def start(self, request: dict[str, Any], script: bytes, stdin: bytes) -> None:
        descriptor = -1
        try:
            descriptor = file_of(stdin) if stdin else os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            launcher, stdin_fd = self._agent.launcher, descriptor
            self._running.start(
                lambda stdout, stderr, mark: launcher.run(request, script, (stdin_fd, stdout, stderr), mark),
                request["timeout_s"],
            )
        except MissingBashError:
            raise
        except OSError as error:
            result = not_started(error)
            self.kept[frames.ERRORS].take(memoryview(result.pop("stderr").encode()))
            self._ended(result)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def size(self) -> int:
        """Bytes that it holds."""
        return sum(len(kept.content) for kept in self.kept.values())

    def join(self, execution: Execution) -> None:
        if self.result is None:
            self.waiting.append(execution)
        else:
            execution.deliver(self)

    def leave(self, execution: Execution) -> None:
        """Nobody waits: nobody wants it."""
        if execution in self.waiting:
            self.waiting.remove(execution)
            if not self.waiting:
                self._running.abandon()

    def _ended(self, result: dict[str, Any]) -> None:
        self.result = {**result, "dropped_bytes": sum(kept.dropped for kept in self.kept.values())}
        waiting, self.waiting = self.waiting, []
        for execution in waiting:
            execution.deliver(self)


class Execution(Operation):
    """`exec`. Its input is the script, `script_bytes` long, and then the command's stdin."""

    def __init__(self, agent: Agent, number: int, request: dict[str, Any]):
        super().__init__(agent, number, request)
        self._input = bytearray()
        self._run: Run | None = None

    def data(self, content: bytes) -> None:
        self._input += content
        self.used(len(content))

    def end(self) -> None:
        name = self.request["op_id"]
        run = self.agent.results.get(name)
        if run is None:
            run = Run(self.agent, self.request)
            length = self.request["script_bytes"]
            try:
                run.start(self.request, bytes(self._input[:length]), bytes(self._input[length:]))
            except MissingBashError as error:
                return self.fail("MissingBashError", str(error))
            self.agent.results.add(name, run)
        self._input.clear()
        self._run = run
        run.join(self)

    def deliver(self, run: Run) -> None:
        self._run = None
        for kind, kept in run.kept.items():
            self.put(bytes(kept.content), kind)
        assert run.result is not None
        self.finish(**run.result)

    def release(self) -> None:
        if self._run:
            self._run.leave(self)
            if not self._run.waiting and self._run.result is None:
                self.agent.results.forget(self.request["op_id"])

    def lose(self) -> None:
        """A command that has a name goes on: somebody will ask again."""
        if self._run and self.request["op_id"]:
            self._run.waiting.remove(self)
            self._run = None
        self.give_up()


class Program(Operation):
    """`spawn`. Its input is the script and then, as it comes, the program's stdin."""

    def __init__(self, agent: Agent, number: int, request: dict[str, Any]):
        super().__init__(agent, number, request)
        self._script = bytearray()
        self._started = False
        self._stdin: Inlet | None = None
        self._running = Running(agent, self._take, self._room, lambda result: self.finish(**result))

    def data(self, content: bytes) -> None:
        if not self._started:
            missing = self.request["script_bytes"] - len(self._script)
            self._script += content[:missing]
            self.used(min(missing, len(content)))
            content = content[missing:]
            if len(self._script) == self.request["script_bytes"]:
                self._start()
        if content and self._stdin:
            self._stdin.put(content)

    def begin(self) -> None:
        if self.request["script_bytes"] == 0:
            self._start()

    def _start(self) -> None:
        self._started = True
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self._stdin = Inlet(self, writer)
        try:
            launcher, script = self.agent.launcher, bytes(self._script)
            self._running.start(
                lambda stdout, stderr, mark: launcher.run(self.request, script, (reader, stdout, stderr), mark)
            )
        except MissingBashError as error:
            return self.fail("MissingBashError", str(error))
        except OSError as error:
            result = not_started(error)
            self.put(result.pop("stderr").encode(), frames.ERRORS)
            return self.finish(**result)
        finally:
            os.close(reader)
        self.agent.send_json(frames.STARTED, self.number, {})

    def end(self) -> None:
        if self._stdin:
            self._stdin.end()

    def control(self, message: dict[str, Any]) -> None:
        if "signal" in message:
            self._running.signal(message["signal"])

    def produce(self) -> None:
        self._running.pull()

    def release(self) -> None:
        if self._stdin:
            self._stdin.close()
        self._running.abandon()

    def _take(self, kind: int, content: memoryview) -> None:
        self.put(bytes(content), kind)

    def _room(self) -> int:
        return frames.CHUNK_BYTES if self.has_room else 0


class Inlet:
    """The writing end of a program's stdin."""

    def __init__(self, operation: Operation, writer: int):
        self._operation = operation
        self._loop = operation.agent.loop
        self._writer = writer
        self._waiting: deque[bytes] = deque()
        self._ending = False
        os.set_blocking(writer, False)

    @property
    def is_waiting(self) -> bool:
        """For the host: all that came is written, and more may come."""
        return not (self._waiting or self._ending)

    def put(self, content: bytes) -> None:
        if self._writer < 0:
            return self._operation.used(len(content))
        self._waiting.append(content)
        self._write()

    def end(self) -> None:
        """Closes it behind what waits."""
        self._ending = True
        self._write()

    def close(self) -> None:
        if self._writer >= 0:
            self._loop.forget(self._writer)
            os.close(self._writer)
            self._writer = -1

    def _write(self, _events: int = 0) -> None:
        while self._waiting and self._writer >= 0:
            try:
                size = os.write(self._writer, self._waiting[0])
            except BlockingIOError:
                return self._loop.watch(self._writer, WRITABLE, self._write)
            except BrokenPipeError:
                self._operation.agent.send_json(frames.CONTROL, self._operation.number, {"stdin": "closed"})
                return self.close()
            self._operation.used(size)
            self._waiting[0] = self._waiting[0][size:]
            if not self._waiting[0]:
                self._waiting.popleft()
        if self._writer >= 0:
            self._loop.forget(self._writer)
        if self._ending and not self._waiting:
            self.close()
