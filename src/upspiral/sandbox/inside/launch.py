"""Starting bash for a command: as whom, with which limits, and with its script in a file in memory.

The script is never an argument: those have 128 KiB at most, and are what `pkill -f` looks at. A read by bash itself,
unlike `$(<file)`, needs no process, so that a command still starts when the sandbox's processes are used up.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from .identity import start_as
from .processes import marks
from .settings import Settings

_BASH = ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash")
_FLAGS = {"AS": "v", "DATA": "d", "FSIZE": "f", "STACK": "s", "CORE": "c", "CPU": "t", "NPROC": "u", "NOFILE": "n"}
_IN_KIB = {"AS", "DATA", "FSIZE", "STACK", "CORE"}
WORKSPACE = "/work"


class MissingBashError(OSError):
    """The image has no bash."""


class Launcher:
    """Starts bash the same way each time."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._bash = next((path for path in _BASH if os.access(path, os.X_OK)), "")
        self._prelude = _limits(settings.rlimits)
        proc = "/proc" if settings.proc_fd is None else f"/proc/self/fd/{settings.proc_fd}"
        self._prelude += f"{{ echo {settings.oom_score_adj} >{proc}/self/oom_score_adj; }} 2>/dev/null; "
        if settings.proc_fd is not None:
            self._prelude += f"exec {settings.proc_fd}<&-; "
        self._marks = marks()
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)  # what is ignored here would be ignored by every command

    def next_mark(self) -> int:
        """For what is started next; see `Lineage`."""
        return next(self._marks)

    def place(self, path: str) -> str:
        """The real path of one that the host names: absolute, or relative to the workspace."""
        if path == WORKSPACE or path.startswith(f"{WORKSPACE}/"):
            path = path[len(WORKSPACE) + 1 :]
        return os.path.join(self._settings.workspace, path) if path else self._settings.workspace

    def run(self, request: Mapping[str, Any], script: bytes, stdio: tuple[int, int, int], mark: int) -> int:
        """Starts a script in a session of its own and returns the process id. Raises OSError when it cannot start."""
        file = file_of(script)
        try:
            tail = f'{set_mark(mark)}; read -rd "" -u {file}; exec {file}<&-; eval "$REPLY"'
            return self._start(request, f"{self._prelude}{self._enter(request)}; {tail}", stdio, [file])
        finally:
            os.close(file)

    def shell(self, request: Mapping[str, Any], stdio: tuple[int, int, int], inherited: Sequence[int]) -> int:
        """Starts a bash that reads its stdin as a person would type, and has these descriptors, too."""
        shell = f"PS1= PS2= HISTFILE= exec {_quoted(self._bash)} --norc --noprofile --noediting +H -i"
        return self._start(request, f"{self._prelude}{self._enter(request)}; {shell}", stdio, inherited)

    def _start(
        self, request: Mapping[str, Any], script: str, stdio: tuple[int, int, int], inherited: Sequence[int]
    ) -> int:
        if not self._bash:
            raise MissingBashError(f"there is no bash in this sandbox (looked for {', '.join(_BASH)})")
        arguments, environment = ["bash", "-c", script], {**self._settings.env, **request["env"]}
        if self._settings.proc_fd is not None:
            inherited = [*inherited, self._settings.proc_fd]
        try:
            return self._spawn(arguments, environment, stdio, inherited)
        except ValueError as error:  # a NUL, half of a surrogate pair, or an "=" in a name
            raise OSError(errno.EINVAL, f"no process can be given this environment or folder: {error}") from None

    def _spawn(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        stdio: tuple[int, int, int],
        inherited: Sequence[int],
    ) -> int:
        if self._settings.uid is not None:
            return start_as(self._settings, self._bash, arguments, environment, (stdio, inherited))
        actions = [(os.POSIX_SPAWN_DUP2, descriptor, number) for number, descriptor in enumerate(stdio)]
        actions += [(os.POSIX_SPAWN_DUP2, each, each) for each in inherited]  # which lets bash have it, and nobody else
        return os.posix_spawn(
            self._bash, list(arguments), environment, file_actions=actions, setsid=True, setsigmask=(),
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD),
        )  # fmt: skip

    def _enter(self, request: Mapping[str, Any]) -> str:
        return f"cd -- {_quoted(self.place(str(request['cwd'])))} || exit"


def set_mark(mark: int) -> str:
    """For bash."""
    return f"ulimit -x {mark} 2>/dev/null"


def file_of(content: bytes) -> int:
    """A descriptor of a file in memory, to be read from its start."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC)
    try:
        _fill(descriptor, content)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _fill(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _limits(rlimits: Mapping[str, int]) -> str:
    """As one `ulimit`. What is higher than this process's own hard limit cannot be had, so that is taken."""
    options = []
    for name, value in rlimits.items():
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        options.append(f"-{_FLAGS[name]} {value // 1024 if name in _IN_KIB else value}")
    return f"ulimit {' '.join(options)}; " if options else ""
