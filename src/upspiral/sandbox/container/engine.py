"""Docker's or Podman's program, asked one thing at a time, each with a deadline."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upspiral.errors import SandboxError

_ANSWER_TIMEOUT_S = 60.0
_MAX_SAID = 2000


class RefusedError(SandboxError):
    """The engine ended with `exit_code`, and said why."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Abilities:
    """Which limits the engine can set on this machine. Without root and without delegated control groups: none."""

    memory: bool
    processes: bool
    cpus: bool


@dataclass(frozen=True, slots=True)
class Engine:
    """The program and the options that every call of it begins with."""

    name: str
    """"docker" or "podman"."""
    command: Sequence[str]

    @classmethod
    def find(cls, name: str, program: str, options: Sequence[str] = ()) -> Engine:
        """Raises SandboxError when the program is not there."""
        path = shutil.which(program)
        if path is None:
            raise SandboxError(f"there is no program {program!r} here; the {name} backend needs it")
        return cls(name, (os.path.abspath(path), *options))

    async def ask(
        self, *arguments: str, content: bytes = b"", folder: Path | None = None, timeout_s: float = _ANSWER_TIMEOUT_S
    ) -> str:
        """What it prints. Raises RefusedError, and SandboxError when it says nothing in time. `folder`: where it is
        run."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE, start_new_session=True, cwd=folder,
            )  # fmt: skip
        except OSError as error:
            raise SandboxError(f"{self.name} could not be started: {error}") from error
        try:
            stdout, stderr = await asyncio.wait_for(process.communicate(content), timeout_s)
        except TimeoutError:
            raise self._silent(arguments, timeout_s) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return self._answer(arguments, process.returncode, stdout, stderr)

    def ask_now(self, *arguments: str, timeout_s: float = _ANSWER_TIMEOUT_S) -> str:
        """As `ask`, for where nothing can be awaited."""
        try:
            done = subprocess.run(
                [*self.command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise self._silent(arguments, timeout_s) from None
        return self._answer(arguments, done.returncode, done.stdout, done.stderr)

    def abilities(self, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> Abilities:
        """Raises SandboxError when the engine cannot be reached."""
        said = self.ask_now("info", "--format", "{{json .}}", timeout_s=timeout_s)
        try:
            told = json.loads(said)
            if problems := told.get("ServerErrors"):
                raise SandboxError(f"{self.name} cannot be reached: {'; '.join(problems)[:_MAX_SAID]}")
            if self.name == "podman":
                controllers = told["host"].get("cgroupControllers") or ()
                return Abilities("memory" in controllers, "pids" in controllers, "cpu" in controllers)
            return Abilities(told["MemoryLimit"], told["PidsLimit"], told["CpuCfsQuota"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # as of Podman by the name of docker
            raise SandboxError(f"{self.command[0]} does not answer as {self.name} does: {said[:200]!r}") from error

    def _answer(self, arguments: Sequence[str], exit_code: int, stdout: bytes, stderr: bytes) -> str:
        if exit_code != 0:
            said = stderr.decode(errors="replace").strip()[-_MAX_SAID:] or f"exit code {exit_code}"
            raise RefusedError(f"{self.name} {arguments[0]}: {said}", exit_code=exit_code)
        return stdout.decode(errors="replace").strip()

    def _silent(self, arguments: Sequence[str], timeout_s: float) -> SandboxError:
        return SandboxError(f"{self.name} {arguments[0]} gave no answer within {timeout_s:g} s")
