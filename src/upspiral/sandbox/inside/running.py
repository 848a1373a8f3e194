"""A command that runs: one bash, its two outlets, its deadline, and how it ended."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable
from typing import Any

from . import frames
from .loop import Timer
from .operations import Agent
from .output import Outlet
from .processes import Lineage, sleeps

GRACE_S = 0.15
"""How long output is waited for after a command's own process has ended: what it left running may hold the pipes."""
_AFTER_KILL_S = 5.0
COULD_NOT_START = 126


class Running:
    """From start to the end of its output. Then `ended` is called once, with what `ExecResult` has of it."""

    def __init__(
        self,
        agent: Agent,
        take: Callable[[int, memoryview], None],
        room: Callable[[], int],
        ended: Callable[[dict[str, Any]], None],
    ):
        self._agent = agent
        self._room = room
        self._ended: Callable[[dict[str, Any]], None] | None = ended
        self._take = take
        self._outlets: list[Outlet] = []
        self._lineage: Lineage | None = None
        self._exit: tuple[int, Any] | None = None
        self._timed_out = False
        self._deadline: Timer | None = None

    def start(self, launch: Callable[[int, int, int], int], timeout_s: float | None = None) -> None:
        """`launch` starts a process that writes to two descriptors and has a mark, and returns its id. Raises what
        that raises, and OSError when there are no descriptors left."""
        self._begin_s, self._kills = time.monotonic(), self._agent.oom_kills()
        mark = self._agent.launcher.next_mark()
        try:
            for kind in (frames.DATA, frames.ERRORS):
                take = functools.partial(self._take, kind)
                self._outlets.append(Outlet(self._agent.loop, take, self._room, self._check))
            pid = launch(self._outlets[0].writer, self._outlets[1].writer, mark)
        except OSError:
            self.abandon()
            raise
        for outlet in self._outlets:
            outlet.begin()
        self._lineage = Lineage(pid, mark)
        self._agent.loop.child(pid, self._exited)
        if timeout_s is not None:
            self._deadline = self._agent.loop.after(timeout_s, self._overrun)

    def signal(self, number: int) -> None:
        """To it and everything that it started, also to what it left running when it ended."""
        if self._lineage:
            self._lineage.signal(number, leader_lives=self._exit is None)

    def abandon(self) -> None:
        """Ends it, and tells nobody. What it left running when it ended by itself is left alone."""
        if self._ended:
            self._ended = None
            self.signal(signal.SIGKILL)
            self._let_go()

    def sleeps(self) -> bool:
        """Its process waits for something, or is stopped. One that only gets no processor does not sleep."""
        return self._lineage is not None and sleeps(self._lineage.leader)

    def pull(self) -> None:
        """There is room for output again."""
        for outlet in self._outlets:
            outlet.pull()

    def _overrun(self) -> None:
        self._timed_out = True
        self.signal(signal.SIGKILL)
        self._agent.loop.after(_AFTER_KILL_S, self._finish)

    def _exited(self, code: int, usage: Any) -> None:
        self._exit = (code, usage)
        if self._deadline:
            self._deadline.cancel()
        self.pull()
        self._check()
        self._settle_later()

    def _settle_later(self) -> None:
        if self._ended:
            self._agent.loop.after(GRACE_S, self._settle)

    def _settle(self) -> None:
        """A reader who is behind is waited for; a background process is not."""
        if self._room() <= 0 and any(outlet.is_open for outlet in self._outlets):
            self._settle_later()
        else:
            self._finish()

    def _check(self) -> None:
        if self._exit and not any(outlet.is_open for outlet in self._outlets):
            self._finish()

    def _finish(self) -> None:
        if not self._ended:
            return
        ended, self._ended = self._ended, None
        self._let_go()
        code, usage = self._exit or (None, None)
        if code is not None and code < 0:
            code = 128 - code
        ended(
            {
                "exit_code": None if self._timed_out else code,
                "timed_out": self._timed_out,
                "oom": self._agent.oom_kills() > self._kills,
                "wall_s": time.monotonic() - self._begin_s,
                "cpu_s": usage.ru_utime + usage.ru_stime if usage else 0.0,
                "peak_mb": usage.ru_maxrss / 1024 if usage else 0.0,
            }
        )

    def _let_go(self) -> None:
        if self._deadline:
            self._deadline.cancel()
        for outlet in self._outlets:
            outlet.drop()


def not_started(error: OSError) -> dict[str, Any]:
    """The result of a command for which the sandbox has no process, descriptor or memory left: its own doing."""
    return {"exit_code": COULD_NOT_START, "stderr": f"bash: the command could not be started: {error.strerror}\n"}
