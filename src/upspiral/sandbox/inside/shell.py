"""Shells that stay: one bash, read to by a pipe as by a person's terminal, and told about by another.

It is interactive, since only then does an interrupt end what it does and not itself. A command comes in a file in
memory; a line on the shell's stdin has it evaluated, and the next line has its status written to the status pipe, also
when an interrupt threw the first line away.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from typing import Any

from . import frames
from .command import Kept
from .launch import MissingBashError, set_mark
from .loop import READABLE, Timer
from .operations import Agent, Operation
from .output import Outlet
from .processes import Lineage, mark_of, send
from .running import not_started

_INTERRUPT_EVERY_S = 0.05
_MAX_INTERRUPTS = 20
_NEW_SHELL = b"upspiral: the shell had ended; this is a new one\n"


class Bash:
    """One life of a shell's bash."""

    def __init__(self, shell: Shell, request: dict[str, Any]):
        self._shell = shell
        self._loop = shell.agent.loop
        self._pid = 0
        self._mark = 0
        """Of what is being evaluated."""
        self._outlets: list[Outlet] = []
        self._is_ready = False
        self._first: bytes | None = None
        self._script = self._commands = self._status = self._status_writer = -1
        try:
            self._start(request)
        except OSError:
            self.close()
            raise
        for outlet in self._outlets:
            outlet.begin()
        self._loop.child(self._pid, lambda code, _usage: shell.ended(self, code))
        self._loop.watch(self._status, READABLE, self._told)
        with contextlib.suppress(BrokenPipeError):  # it has died, which will be told
            self._say("")

    def _start(self, request: dict[str, Any]) -> None:
        """Raises OSError when there is no process or descriptor left."""
        for kind in (frames.DATA, frames.ERRORS):
            take = functools.partial(self._take, kind)
            self._outlets.append(Outlet(self._loop, take, lambda: 1 << 20, lambda: None))
        self._script = os.memfd_create("script", os.MFD_CLOEXEC)
        with contextlib.ExitStack() as its_ends:
            commands, self._commands = os.pipe2(os.O_CLOEXEC)
            its_ends.callback(os.close, commands)
            self._status, self._status_writer = os.pipe2(os.O_CLOEXEC)
            its_ends.callback(os.close, self._status_writer)
            for ours in (self._commands, self._status):  # commands may fill them, too: nobody here waits for that
                os.set_blocking(ours, False)
            stdio = (commands, self._outlets[0].writer, self._outlets[1].writer)
            self._pid = self._shell.agent.launcher.shell(request, stdio, [self._script, self._status_writer])

    def evaluate(self, script: bytes) -> None:
        """Nothing else is being evaluated."""
        self._mark = self._shell.agent.launcher.next_mark()
        if not self._is_ready:
            self._first = script
            return
        self.pull()
        os.ftruncate(self._script, 0)
        os.lseek(self._script, 0, os.SEEK_SET)
        view = memoryview(script)
        while view:
            view = view[os.write(self._script, view) :]
        os.lseek(self._script, 0, os.SEEK_SET)
        line = f'{set_mark(self._mark)}; {{ read -rd "" -u {self._script} || :; }} 2>/dev/null; '
        line += f'eval "$REPLY" </dev/null {self._hidden()}\n'
        self._say(line)

    def pull(self) -> None:
        for outlet in self._outlets:
            outlet.pull()

    def interrupt(self, again: bool) -> None:
        """What was started by what is being evaluated gets an interrupt, or is killed the second time; bash gets the
        interrupt."""
        for process in self._lineage.living(leader_lives=True):
            if process.pid != self._pid and mark_of(process.pid) == self._mark:
                send(process.pid, signal.SIGKILL if again else signal.SIGINT)
        send(self._pid, signal.SIGINT)

    def cpu_s(self) -> float:
        """Of it and all that it waited for, so far."""
        try:
            with open(f"/proc/{self._pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return 0.0
        return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """With what was started by what is being evaluated, and all that still descends from it."""
        self._lineage.signal(signal.SIGKILL, leader_lives=True)

    def close(self) -> None:
        self._loop.forget(self._status)
        for descriptor in (self._script, self._commands, self._status):
            if descriptor >= 0:
                os.close(descriptor)
        for outlet in self._outlets:
            outlet.drop()

    @property
    def _lineage(self) -> Lineage:
        return Lineage(self._pid, self._mark)

    def _hidden(self) -> str:
        """Commands must not hold or see the shell's own pipes."""
        return f"{self._script}<&- {self._status_writer}>&-"

    def _told(self, _events: int) -> None:
        try:
            lines = os.read(self._status, 4096).split()
        except BlockingIOError:
            return
        if not lines:
            return self._loop.forget(self._status)
        if not self._is_ready:
            self.pull()
            self._is_ready = True
            if self._first is not None:
                with contextlib.suppress(OSError):  # it has died, which will be told, or will not answer in time
                    self.evaluate(self._first)
        elif lines[-1].isdigit():
            self._mark = 0
            self._shell.done(int(lines[-1]) & 0xFF)  # commands can find the pipe, and say any number

    def _say(self, line: str) -> None:
        """And asks for its status. Raises BrokenPipeError when bash has died, BlockingIOError when it does not read."""
        question = f"{{ echo $? >&{self._status_writer}; }} 2>/dev/null\n"
        os.write(self._commands, (line + question).encode())

    def _take(self, kind: int, content: memoryview) -> None:
        """What bash says before it is ready is that it has no terminal."""
        if self._is_ready:
            self._shell.take(kind, content)


class Shell(Operation):
    """`shell`: lasts until it is given up."""

    def __init__(self, agent: Agent, number: int, request: dict[str, Any]):
        super().__init__(agent, number, request)
        self._bash: Bash | None = None
        self._run: ShellRun | None = None
        self._complaint = b""

    def begin(self) -> None:
        try:
            self._bash = Bash(self, self.request)
        except MissingBashError as error:
            return self.fail("MissingBashError", str(error))
        except OSError:  # as with any command, the sandbox's own doing: the first one tries again, and says so
            pass
        self.agent.send_json(frames.STARTED, self.number, {})

    def evaluate(self, run: ShellRun, script: bytes) -> None:
        """Raises OSError when another bash is needed and cannot be started."""
        bash = self._bash or self._another()
        run.cpu_before_s = bash.cpu_s()
        try:
            bash.evaluate(script)
        except BrokenPipeError:  # it has died, and nobody told yet
            self.ended(bash, 0)
            self._another().evaluate(script)
        self._run = run
        run.take(frames.ERRORS, memoryview(self._complaint))
        self._complaint = b""

    def _another(self) -> Bash:
        self._bash = Bash(self, self.request)
        self._complaint = _NEW_SHELL
        return self._bash

    def take(self, kind: int, content: memoryview) -> None:
        """What is written while nothing is evaluated is nobody's."""
        if self._run:
            self._run.take(kind, content)

    def interrupt(self, again: bool) -> None:
        if self._bash:
            self._bash.interrupt(again)

    def kill(self) -> None:
        if self._bash:
            self._bash.kill()

    def done(self, status: int) -> None:
        if self._run and self._bash:
            self._bash.pull()
            run, self._run = self._run, None
            run.ended(status, self._bash.cpu_s() - run.cpu_before_s)

    def ended(self, bash: Bash, code: int) -> None:
        """The bash is gone: it was told to exit, or killed."""
        if bash is self._bash:
            bash.pull()
            bash.close()
            self._bash = None
            if run := self._run:
                self._run = None
                run.ended(code if code >= 0 else 128 - code, 0.0)

    def leave(self, run: ShellRun) -> None:
        """Whoever asked for it does not wait any more."""
        if self._run is run:
            self._run = None
            self.kill()

    def release(self) -> None:
        if bash := self._bash:
            self._bash = None
            bash.kill()
            bash.close()
        if run := self._run:
            self._run = None
            run.fail("the shell was closed")


class ShellRun(Operation):
    """`run`: evaluates its input in the shell whose operation `shell` names."""

    cpu_before_s = 0.0

    def __init__(self, agent: Agent, number: int, request: dict[str, Any]):
        super().__init__(agent, number, request)
        self._kept = {kind: Kept(agent.settings.output_bytes) for kind in (frames.DATA, frames.ERRORS)}
        self._script = bytearray()
        self._shell: Shell | None = None
        self._timer: Timer | None = None
        self._interrupts = 0

    def data(self, content: bytes) -> None:
        self._script += content
        self.used(len(content))

    def end(self) -> None:
        shell = self.agent.operations.get(self.request["shell"])
        if not isinstance(shell, Shell):
            return self.fail("the shell was closed")
        self._begin_s = time.monotonic()
        try:
            shell.evaluate(self, bytes(self._script))
        except OSError as error:
            result = not_started(error)
            self.put(result.pop("stderr").encode(), frames.ERRORS)
            return self.finish(**result)
        self._shell = shell
        self._timer = self.agent.loop.after(self.request["timeout_s"], self._overrun)

    def take(self, kind: int, content: memoryview) -> None:
        self._kept[kind].take(content)

    def ended(self, status: int, cpu_s: float) -> None:
        self._shell = None
        for kind, kept in self._kept.items():
            self.put(bytes(kept.content), kind)
        timed_out = self._interrupts > 0
        self.finish(
            exit_code=None if timed_out else status,
            timed_out=timed_out,
            wall_s=time.monotonic() - self._begin_s,
            cpu_s=max(0.0, cpu_s),
            dropped_bytes=sum(kept.dropped for kept in self._kept.values()),
        )

    def release(self) -> None:
        if self._timer:
            self._timer.cancel()
        if shell := self._shell:
            self._shell = None
            shell.leave(self)

    def _overrun(self) -> None:
        """Interrupts it until it gives in; a shell that does not is killed, and the next command gets a new one."""
        if self._shell is None:
            return
        self._interrupts += 1
        if self._interrupts > _MAX_INTERRUPTS:
            self._shell.kill()
        else:
            self._shell.interrupt(again=self._interrupts > 1)
        self._timer = self.agent.loop.after(_INTERRUPT_EVERY_S, self._overrun)
