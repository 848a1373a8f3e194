"""Grading: the work of an agent is laid out in a fresh sandbox, the exam beside it, and a judge says what it is worth.

How it goes:

1. `hand_in` takes the files out of the agent's sandbox. Its processes, its environment and whatever it changed outside
   of the workspace stay behind.
2. `grade` makes a sandbox of the exam's spec, lays the files out without what might pass for a part of the exam, then
   the exam's own files.
3. A judge (`inside/judge.py`) runs there as a command of its own. Its key, chosen for this one time, and its check come
   by its standard input; the words it says are signed with the key. Nothing else that is written counts.

What a check should be: a program that *runs* the work and compares what comes out with what it knows:

    check = '''
    for number, square in {3: 9, 12: 144}.items():
        done = run(["python3", "square.py"], stdin=str(number).encode())
        mark(f"square of {number}", done.stdout.strip() == str(square).encode())
    '''

The work then never sees the check, nor what is expected, and there is no way by which it could say the verdict: not by
output, exit codes, exit handlers, files, plugins, variables, programs that it left running, nor by killing the judge,
which fails it. What a check imports it should import in its first lines, before it runs anything.

What this does not protect from:

- **Tests that import the work** (`pytest_check`). They run in one process with it, and what runs in a process can say
  anything in its name. A work that leaves early, or writes into every descriptor it finds, fails; and so no conftest,
  setting, plugin or compiled file of it is heeded. A module that looks for the key in the memory of its own process, or
  replaces pytest's functions, passes. A check that runs the work has no such gap.
- Exam files that are laid out on disk can be read, and changed, by the work while it runs. What must stay hidden
  belongs into the check's source.
- A work that recognises that it is being graded, or that computes nothing and knows the answers by heart.
- Whoever breaks out of the sandbox. How hard that is is a matter of the backend (`Capabilities.isolation`).
- A work that breaks its sandbox, where the backend lacks a robust agent: then there is no verdict, but SandboxError.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import posixpath
import secrets
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from upspiral.errors import SandboxError
from upspiral.sandbox.base import WORKSPACE, Command, ExecResult, Sandbox, SandboxBackend, SandboxSpec
from upspiral.sandbox.grading.work import Sifted, Work, WorkError, sift

_SETUP_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 20.0
"""How long the judge may take to begin and to end, beside the check."""
_VERDICT_BYTES = 8 << 20
_NOT_STARTED = (126, 127)
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Exam:
    """How a work is graded."""

    check: str
    """Python source that runs in the judge (Python 3.8 or newer, standard library). It has `run`, `read`, `pytest` and
    `mark`: see `inside/judge.py`. A check that ends with an exception, or without a mark, is not passed."""
    timeout_s: float = 120.0
    spec: SandboxSpec = field(default_factory=SandboxSpec)
    """Of the sandbox to grade in: as the agent's was, without what only the agent needed. It has python3. Its files are
    not laid out: what the agent left of them comes with the work."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Path in the workspace -> content; laid out after the work, in the place of what it has there."""

    def __post_init__(self) -> None:
        for path in self.files:
            if path != posixpath.normpath(path) or path.startswith(("/", "..")) or path == ".":
                raise ValueError(f"exam files: {path!r} is no path in the workspace; use one such as tests/test_it.py")
        limits, sizes = self.spec.limits, [len(content) for content in self.files.values()]
        if max(sizes, default=0) > limits.file_mb << 20 or sum(sizes) > limits.disk_mb << 20:
            raise ValueError(f"exam files: {sum(sizes)} bytes, more than the file_mb or disk_mb of its spec's limits")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge said."""

    marks: Mapping[str, bool]
    problem: str = ""
    """Why the work has failed, whatever its marks."""
    log: bytes = b""
    """What work and check wrote meanwhile. For people: anybody inside may have written it."""
    left_out: Sequence[str] = ()
    """Names in the work that were not laid out."""

    @property
    def passed(self) -> bool:
        return not self.problem and len(self.marks) > 0 and all(self.marks.values())


def pytest_check(
    paths: Sequence[str], *, must_pass: Sequence[str] = (), python_path: Sequence[str] = (), timeout_s: float = 100.0
) -> str:
    """A check of tests that import the work: `paths` are what pytest is given, `must_pass` ids such as
    "tests/test_it.py::test_one"; none: all that there are. See above for what it cannot do."""
    given = f"{list(paths)!r}, python_path={list(python_path)!r}, timeout_s={timeout_s!r}"
    return (
        f"outcomes = pytest({given})\n"
        f"for name in {list(must_pass)!r} or outcomes or ['the tests came to their end']:\n"
        "    mark(name, outcomes.get(name) == 'passed')\n"
    )


async def grade(backend: SandboxBackend, exam: Exam, work: Work) -> Verdict:
    """Whatever the work does is a verdict; SandboxError means that the infrastructure failed, or the exam itself."""
    if work.problem:
        return Verdict({}, work.problem)
    async with backend.acquire(replace(exam.spec, files={})) as sandbox:
        try:
            sifted = await _lay_out(sandbox, exam, work)
        except (WorkError, OSError) as error:
            return Verdict({}, f"the work cannot be laid out: {error}")
        key = secrets.token_bytes(32)
        done = await sandbox.exec(_judging(exam, key), timeout_s=exam.timeout_s + _START_TIMEOUT_S)
    begun, ended = _words(done.stdout, key)
    if begun is None:
        complaint = done.stderr.decode(errors="replace").strip()[-2000:]
        raise SandboxError(f"the judge could not begin (is there a python3 in the sandbox?): {complaint or done}")
    if ended is None:
        return Verdict({}, _silence(done, exam), done.stderr, sifted.left_out)
    return Verdict(ended["marks"], ended["problem"], done.stderr, sifted.left_out)


async def _lay_out(sandbox: Sandbox, exam: Exam, work: Work) -> Sifted:
    """Nothing of the work runs meanwhile."""
    place = await _must(sandbox, "pwd -P", SandboxError)
    sifted = await asyncio.to_thread(sift, work, os.fsdecode(place).strip(), exam.files)
    if work.is_whole:
        await _must(sandbox, "find . -mindepth 1 -delete", SandboxError)
    elif sifted.removed:
        names = b"\0".join(f"./{name}".encode(errors="surrogateescape") for name in sifted.removed)
        await _must(sandbox, Command("xargs -0 rm -rf --", stdin=names), OSError)
    await sandbox.upload(sifted.archive, WORKSPACE)
    for path, content in exam.files.items():
        await sandbox.write(path, content)
    return sifted


async def _must(sandbox: Sandbox, command: str | Command, failure: type[SandboxError | OSError]) -> bytes:
    """What it says. `failure`: SandboxError for what has nothing to do with the work."""
    done = await sandbox.exec(command, timeout_s=_SETUP_TIMEOUT_S)
    if done.exit_code in _NOT_STARTED:
        failure = SandboxError
    if done.exit_code != 0:
        raise failure(done.stderr.decode(errors="replace").strip() or f"{command} failed: {done}")
    return done.stdout


def _judging(exam: Exam, key: bytes) -> Command:
    source = files("upspiral.sandbox.inside").joinpath("judge.py").read_text("utf-8")
    task = json.dumps({"key": key.hex(), "check": exam.check})
    script = f"exec env -i PATH={_PATH} LANG=C.UTF-8 python3 -I -S -c {shlex.quote(source)}"
    return Command(script, stdin=task.encode(), output_bytes=_VERDICT_BYTES)


def _words(output: bytes, key: bytes) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The judge's first and last word, each None when it did not come. Lines that it did not sign are nothing."""
    words: list[dict[str, Any]] = []
    for line in output.splitlines():
        signature, _, text = line.partition(b" ")
        if hmac.compare_digest(signature, hmac.new(key, text, hashlib.sha256).hexdigest().encode()):
            words.append(json.loads(text))
    begun = next((each for each in words if each["begun"]), None)
    return begun, next((each for each in words if not each["begun"]), None)


def _silence(done: ExecResult, exam: Exam) -> str:
    if done.timed_out:
        return f"there was no verdict within {exam.timeout_s:g} s"
    if done.truncated:
        return f"the verdict is larger than {_VERDICT_BYTES} bytes"
    return f"the judge was ended before its verdict (exit code {done.exit_code}): only the work can have done that"
