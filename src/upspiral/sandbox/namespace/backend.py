"""NamespaceBackend: each command of a sandbox is one bubblewrap around the sandbox's workspace."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from upspiral.errors import CapabilityError, SandboxError, SandboxGoneError
from upspiral.sandbox.base import (
    WORKSPACE,
    ByteStream,
    Capabilities,
    Command,
    Diff,
    ExecResult,
    Process,
    Sandbox,
    SandboxSpec,
    Shell,
    Snapshot,
)
from upspiral.sandbox.namespace import bubblewrap
from upspiral.sandbox.namespace.bubblewrap import Identity, Places
from upspiral.sandbox.namespace.process import Outcome, Program, run
from upspiral.sandbox.namespace.seccomp import filter_program
from upspiral.sandbox.namespace.workspace import Workspace, make_owner_folder, remove_tree, sweep

_PROBE_TIMEOUT_S = 20.0
_INNER_UID = 1000
_FREE_UIDS = range(20_000, 60_000)
"""Ids for sandboxes when this process is root: no user of a usual system has one of them."""


class NamespaceSandbox:
    """A workspace that commands run in, one set of namespaces a command: what a command leaves running dies with it."""

    def __init__(self, backend: NamespaceBackend, spec: SandboxSpec, folder: Path):
        self.id = folder.name
        self._spec = spec
        self._bwrap = backend.bwrap
        self._filter = backend.filter
        self._identity = backend.new_identity()
        self._folder = folder
        self._running: set[asyncio.Task[Outcome]] = set()
        self._stopped = False
        folder.mkdir()
        bubblewrap.write_identity(folder / "names", self._identity)
        self._workspace = Workspace(folder / "work", self._identity.owner)
        places = Places(backend.etc, folder / "names", self._workspace.path)
        self._arguments = bubblewrap.arguments(spec, self._identity, places)
        self._command = bubblewrap.inner_command(spec, self._identity)
        for path, content in spec.files.items():
            self._workspace.write(path, content)

    async def exec(self, command: str | Command, *, timeout_s: float) -> ExecResult:
        """Runs a bash command line. `exit_code` follows the shell: 128 + the signal when a signal ended it."""
        self._check_live()
        command = Command(command) if isinstance(command, str) else command
        if command.cwd != WORKSPACE or command.op_id:
            raise CapabilityError(
                "this sandbox runs commands in the workspace only, and does not remember them by op_id"
            )
        task = asyncio.ensure_future(self._exec(command, timeout_s))
        self._running.add(task)
        try:
            outcome = await task
        except asyncio.CancelledError:
            if self._stopped and not _is_being_cancelled():
                raise SandboxGoneError("the sandbox was stopped while a command ran") from None
            raise
        finally:
            self._running.discard(task)
        return ExecResult(
            exit_code=outcome.return_code,
            stdout=outcome.stdout,
            stderr=outcome.stderr,
            timed_out=outcome.return_code is None,
            dropped_bytes=outcome.dropped_bytes,
            wall_s=outcome.wall_s,
        )

    async def _exec(self, command: Command, timeout_s: float) -> Outcome:
        with contextlib.ExitStack() as open_files:
            status_reader, status_writer = os.pipe2(os.O_CLOEXEC)
            open_files.callback(os.close, status_reader)
            given = open_files.enter_context(contextlib.ExitStack())
            given.callback(os.close, status_writer)
            script = _descriptor(given, command.script.encode())
            options = [*self._arguments, *bubblewrap.environment(self._spec, command.env)]
            options += bubblewrap.script_arguments(script)
            options += ["--json-status-fd", str(status_writer)]
            descriptors = [script, status_writer]
            if self._filter:
                descriptors.append(_descriptor(given, self._filter))
                options += ["--seccomp", str(descriptors[-1])]
            descriptors.append(_descriptor(given, "".join(f"{option}\0" for option in options).encode()))
            argv = [str(self._bwrap), "--args", str(descriptors[-1]), "--", *self._command]
            limit = self._spec.limits.output_bytes if command.output_bytes is None else command.output_bytes
            try:
                program = Program(argv, descriptors, command.stdin)
                outcome = await run(program, timeout_s=timeout_s, output_bytes=limit, started=given.close)
            except OSError as error:
                raise SandboxError(f"bubblewrap could not be started: {error}") from error
            if outcome.return_code is not None and not _command_ended(os.read(status_reader, 1 << 16)):
                said = outcome.stderr.decode(errors="replace").strip()
                raise SandboxError(f"bubblewrap broke (exit code {outcome.return_code}): {said[-500:]}")
            return outcome

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        self._check_live()
        return self._workspace.read(path, max_bytes)

    async def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        self._check_live()
        if mode != 0o644:
            raise CapabilityError("this sandbox writes files of mode 0644 only")
        self._workspace.write(path, content)

    async def list_files(self, path: str = WORKSPACE) -> Sequence[str]:
        self._check_live()
        if path != WORKSPACE:
            raise CapabilityError("this sandbox lists the files of its whole workspace only")
        return await asyncio.to_thread(self._workspace.list_files)

    async def spawn(self, command: str | Command) -> Process:
        raise CapabilityError("this sandbox cannot spawn programs")

    async def shell(self) -> Shell:
        raise CapabilityError("this sandbox has no shells that stay")

    async def upload(self, archive: bytes, path: str = WORKSPACE) -> None:
        raise CapabilityError("this sandbox takes no archives")

    async def download(self, path: str = WORKSPACE, *, max_bytes: int = 1 << 28) -> bytes:
        raise CapabilityError("this sandbox gives no archives")

    async def diff(self) -> Diff:
        raise CapabilityError("this sandbox cannot tell what was written")

    async def snapshot(self) -> Snapshot:
        raise CapabilityError("this sandbox cannot take a snapshot")

    async def fork(self, count: int = 1) -> Sequence[Sandbox]:
        raise CapabilityError("this sandbox cannot fork")

    async def restore(self, snapshot: Snapshot) -> None:
        raise CapabilityError("this sandbox cannot restore a snapshot")

    async def connect(self, port: int) -> ByteStream:
        raise CapabilityError("this sandbox cannot connect to a port inside")

    async def stop(self) -> None:
        self._stopped = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await asyncio.to_thread(remove_tree, self._folder)

    def _check_live(self) -> None:
        if self._stopped:
            raise SandboxGoneError("the sandbox was stopped")


class NamespaceBackend:
    """Sandboxes on this machine. Makes one folder for its workspaces, below `root` (default: in memory, /dev/shm).

    Raises SandboxError when bubblewrap or the namespaces are not to be had, with the cause and what to do.

    Not limited: the sum of memory over the processes of a sandbox and the sum of its files (only each one is).
    """

    def __init__(self, root: Path | None = None):
        self.bwrap = bubblewrap.bubblewrap_path()
        self.filter = filter_program()
        sweep(root)
        self._folder = make_owner_folder(root)
        self.etc = self._folder / "etc"
        self._uids = itertools.count(secrets.randbelow(len(_FREE_UIDS)))
        self._numbers = itertools.count()
        self._live: set[NamespaceSandbox] = set()
        try:
            bubblewrap.make_etc(self.etc)
            self._probe()
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            isolation="namespace",
            untrusted=True,
            network_none=True,
            forward_sockets=True,
            mounts=True,
            memory_limit="process",
        )

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[NamespaceSandbox]:
        self.capabilities.check(spec, backend="namespace")
        _check(spec)
        try:
            sandbox = NamespaceSandbox(self, spec, self._folder / str(next(self._numbers)))
        except OSError as error:
            raise SandboxError(f"no workspace could be made below {self._folder}: {error}") from error
        self._live.add(sandbox)
        try:
            yield sandbox
        finally:
            self._live.discard(sandbox)
            await asyncio.shield(sandbox.stop())

    async def drop(self, snapshot: Snapshot) -> None:
        raise CapabilityError("the namespace backend takes no snapshots")

    async def stop(self) -> None:
        await asyncio.gather(*(sandbox.stop() for sandbox in self._live))
        self._live.clear()
        await asyncio.to_thread(remove_tree, self._folder)

    def new_identity(self) -> Identity:
        """As root every sandbox has a user id of its own, so that limits and signals of one do not reach another."""
        if os.geteuid() != 0:
            return Identity(_INNER_UID, as_root=False)
        return Identity(_FREE_UIDS[next(self._uids) % len(_FREE_UIDS)], as_root=True)

    def _probe(self) -> None:
        """Runs one command the way sandboxes will."""
        identity = self.new_identity()
        folder = self._folder / "probe"
        folder.mkdir()
        bubblewrap.write_identity(folder / "names", identity)
        places = Places(self.etc, folder / "names", Workspace(folder / "work", identity.owner).path)
        spec = SandboxSpec()
        with contextlib.ExitStack() as open_files:
            script = _descriptor(open_files, b"true")
            options = [*bubblewrap.arguments(spec, identity, places), *bubblewrap.script_arguments(script)]
            argv = [str(self.bwrap), *options, "--", *bubblewrap.inner_command(spec, identity)]
            try:
                done = subprocess.run(
                    argv, pass_fds=[script], env={}, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False
                )
                problem = done.stderr.decode(errors="replace").strip() if done.returncode else ""
            except (OSError, subprocess.TimeoutExpired) as error:
                problem = str(error)
        remove_tree(folder)
        if problem:
            raise SandboxError(
                f"bubblewrap ({self.bwrap}) cannot make a sandbox here: {problem}. Namespaces may be switched off: "
                "check `sysctl user.max_user_namespaces kernel.apparmor_restrict_unprivileged_userns`; inside a "
                "container, start it with permission to mount (for example docker run --privileged)"
            )


def _check(spec: SandboxSpec) -> None:
    for port, path in spec.forward_sockets.items():
        if not 0 < port < 65536:
            raise CapabilityError(f"forward_sockets: {port} is not a port; use 1 to 65535")
        if not os.path.exists(path):
            raise CapabilityError(f"forward_sockets[{port}]: there is no socket at {path}")
    for path, inside in spec.mounts.items():
        if not os.path.exists(path):
            raise CapabilityError(f"mounts: there is nothing at {path} to be mounted at {inside}")
        if os.path.normpath(inside) != inside or not inside.startswith("/opt/"):
            raise CapabilityError(f"mounts[{path}]: {inside!r} is no path below /opt; use one such as /opt/agent")


def _descriptor(open_files: contextlib.ExitStack, content: bytes) -> int:
    """An anonymous file in memory, to be read from its start."""
    descriptor = os.memfd_create("upspiral", os.MFD_CLOEXEC)
    open_files.callback(os.close, descriptor)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _command_ended(status: bytes) -> bool:
    """bubblewrap reports an exit code only when the command was started. Its own failures look alike otherwise."""
    reports: Iterable[dict[str, object]] = (json.loads(line) for line in status.splitlines() if line.strip())
    return any("exit-code" in report for report in reports)


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
