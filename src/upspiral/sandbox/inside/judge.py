"""The judge: runs in a fresh sandbox beside the work of an agent, and says what the work is worth.

By its standard input it gets all that the work must not see: the key that signs its words, and the check, with what it
expects, as Python source. Neither is ever in a file, an argument or an environment. Before anything of the work runs,
this process is closed to inspection by others of the same user. The work runs in processes of its own.

A line of output is the HMAC-SHA256 of a JSON text, a space, and that text.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

OUTPUT_BYTES = 1 << 20
_REPORT_BYTES = 16 << 20
_KEY_BYTES = 32
_COULD_NOT_START = 126
_PR_SET_DUMPABLE = 4
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_PYTEST = """
import hashlib, hmac, json, os, sys
key_file, report_file, python_path, arguments = json.loads(sys.argv[1])
key = os.read(key_file, 32)
os.ftruncate(key_file, 0)
os.close(key_file)
sys.argv[1:] = []
sys.path += [*python_path, os.getcwd()]
sys.dont_write_bytecode = True
sys.pycache_prefix = "/dev/null"
import pytest

class Reporter:
    def __init__(self):
        self.count = 0

    def send(self, name, outcome):
        text = json.dumps([self.count, name, outcome])
        self.count += 1
        os.write(report_file, f"{hmac.new(key, text.encode(), hashlib.sha256).hexdigest()} {text}\\n".encode())

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.send(report.nodeid, report.outcome)

    def pytest_collectreport(self, report):
        if report.outcome != "passed":  # a module that skips itself, too: its tests are then not known by name
            self.send(report.nodeid, report.outcome)

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus in (0, 1):  # all tests ran; the work can break a session off
            self.send("", "end")

pytest.main(arguments, plugins=[Reporter()])
"""


class Finished(NamedTuple):
    """How a program of the work ended."""

    exit_code: int | None
    """Negative: the signal. None: it ran to its deadline."""
    stdout: bytes
    stderr: bytes


class Judge:
    """What a check can do: its methods are functions there."""

    def __init__(self) -> None:
        self.marks: dict[str, bool] = {}

    def mark(self, name: str, passed: bool) -> None:
        """A name that was marked twice has passed when it has passed both times."""
        self.marks[name] = bool(passed) and self.marks.get(name, True)

    def run(
        self,
        arguments: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 10.0,
        env: Mapping[str, str] | None = None,
        hand_over: Sequence[int] = (),
    ) -> Finished:
        """Runs a program in the workspace, and ends what it left in its process group. Of its output, and of its
        complaints, the first MiB is kept. One that cannot be started has exit code 126, and says why in `stderr`."""
        files = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdin", "stdout", "stderr")]
        try:
            _fill(files[0], stdin)
            exit_code = self._run(arguments, files, timeout_s, env or {}, hand_over)
            return Finished(exit_code, *(os.pread(file, OUTPUT_BYTES, 0) for file in files[1:]))
        except OSError as error:
            return Finished(_COULD_NOT_START, b"", str(error).encode())
        finally:
            for file in files:
                os.close(file)

    def _run(
        self, arguments: Sequence[str], files: list[int], timeout_s: float, env: Mapping[str, str], given: Sequence[int]
    ) -> int | None:
        environment = {"PATH": _PATH, "HOME": os.getcwd(), "LANG": "C.UTF-8", **env}
        program = subprocess.Popen(
            arguments, stdin=files[0], stdout=files[1], stderr=files[2], env=environment, pass_fds=given,
            start_new_session=True,
        )  # fmt: skip
        try:
            return program.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(program.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                program.wait(timeout_s)

    def read(self, path: str, max_bytes: int = OUTPUT_BYTES) -> bytes | None:
        """The beginning of a regular file; None for anything else. What the work left may be a pipe or a link."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return os.read(file, max_bytes) if stat.S_ISREG(os.fstat(file).st_mode) else None
        finally:
            os.close(file)

    def pytest(
        self, paths: Sequence[str], *, python_path: Sequence[str] = (), timeout_s: float = 60.0
    ) -> Mapping[str, str]:
        """Outcomes ("passed", "failed", "skipped") by the tests' ids; empty when the session did not come to its end,
        or when somebody else wrote into its report.

        `python_path`: folders to import pytest and its like from. The workspace comes last. Settings, plugins and
        compiled files that lie in it are not heeded.
        """
        key = os.urandom(_KEY_BYTES)
        key_file, report_file = (os.memfd_create(name, 0) for name in ("key", "report"))
        try:
            _fill(key_file, key)
            root = os.getcwd()
            options = [f"--rootdir={root}", f"--confcutdir={root}", "--import-mode=append", "-p", "no:cacheprovider"]
            given = json.dumps([key_file, report_file, list(python_path), ["-c", os.devnull, *options, *paths]])
            done = self.run(
                ["python3", "-I", "-c", _PYTEST, given],
                timeout_s=timeout_s,
                env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
                hand_over=[key_file, report_file],
            )
            sys.stderr.write((done.stdout + done.stderr).decode(errors="replace"))
            return _outcomes(key, os.pread(report_file, _REPORT_BYTES, 0))
        finally:
            os.close(key_file)
            os.close(report_file)


def _outcomes(key: bytes, report: bytes) -> Mapping[str, str]:
    outcomes: dict[str, str] = {}
    lines = report.splitlines()
    for number, line in enumerate(lines):
        signature, _, text = line.partition(b" ")
        if not hmac.compare_digest(signature, _signature(key, text)):
            return {}
        count, name, outcome = json.loads(text)
        if count != number or (outcome == "end") != (number == len(lines) - 1):
            return {}
        if outcome != "end" and outcomes.get(name, "passed") == "passed":
            outcomes[name] = outcome
    return outcomes


def _signature(key: bytes, text: bytes) -> bytes:
    return hmac.new(key, text, hashlib.sha256).hexdigest().encode()


def _fill(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)


def _say(key: bytes, **words: object) -> None:
    text = json.dumps(words).encode()
    sys.stdout.buffer.write(_signature(key, text) + b" " + text + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("this process could not be closed to inspection (PR_SET_DUMPABLE)")
    task = json.load(sys.stdin)
    key, judge, problem = bytes.fromhex(task["key"]), Judge(), ""
    check = compile(task["check"], "<check>", "exec")
    _say(key, begun=True)
    functions = {"run": judge.run, "read": judge.read, "pytest": judge.pytest, "mark": judge.mark}
    try:
        exec(check, {"__name__": "__check__", **functions})
    except BaseException as error:  # also SystemExit: a check that leaves early has not passed
        problem = f"the check ended with {type(error).__name__}: {error}"
    _say(key, begun=False, marks=judge.marks, problem=problem)


if __name__ == "__main__":
    main()
