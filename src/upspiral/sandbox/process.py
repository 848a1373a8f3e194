"""Sandboxes that are ordinary processes with limits: where there are no namespaces, and for code that one trusts.

What there is: a folder, an environment of its own and rlimits; where the kernel has Landlock (Linux 5.13), no file
outside of the folder can be written, and none outside of the system's programs read; as root, a user id of its own for
each sandbox. What there is not: a network of its own, a view of its own of processes, a limit on what a sandbox uses
together. So `network = "none"`, the default of a spec, is refused unless the backend is made with `allow_network`, and
`Capabilities.untrusted` is False.

A command of the same user as the agent (wherever this process is not root) can kill its agent; the sandbox is then
broken (SandboxError). A process that has left its session, its parent and its environment survives that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from upspiral.errors import SandboxError
from upspiral.sandbox import inside
from upspiral.sandbox.base import Capabilities, SandboxSpec, Snapshot
from upspiral.sandbox.connected import ConnectedSandbox, settings_for
from upspiral.sandbox.connection import Connection
from upspiral.sandbox.inside.settings import Confinement, Settings
from upspiral.sandbox.open_files import allow_many, enough_for_a_sandbox
from upspiral.sandbox.owner import Owner, left_over_folders, make_folder, remove_tree

_KIND = "process"
"""In the labels of its folders."""
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0
_FREE_UIDS = range(20_000, 60_000)
"""Ids for sandboxes when this process is root: no user of a usual system has one of them."""
_READABLE = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/etc",
    "/opt",
    "/proc",
    "/dev",
    "/run/current-system",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
_LAST_WORDS_BYTES = 2000


class ProcessSandbox(ConnectedSandbox):
    """An agent that is a child of this process, and a folder."""

    def __init__(self, folder: Path, agent: asyncio.subprocess.Process, connection: Connection, spec: SandboxSpec):
        super().__init__(f"process-{agent.pid}-{folder.name}-{secrets.token_hex(4)}", connection, spec.limits)
        self._folder = folder
        self._agent = agent

    async def begin(self, spec: SandboxSpec) -> None:
        """Raises SandboxError with what the agent said when it does not start."""
        try:
            await self._connection.ping(timeout_s=_START_TIMEOUT_S)
        except SandboxError as error:
            log = (self._folder / "agent.log").read_bytes()[-_LAST_WORDS_BYTES:].decode(errors="replace").strip()
            raise SandboxError(f"the sandbox's agent did not start: {log or error}") from error
        trial = await self.exec("true", timeout_s=_START_TIMEOUT_S)
        if trial.exit_code != 0:
            said = trial.stderr.decode(errors="replace").strip()
            raise SandboxError(
                f"no command can be run in {self._folder}: {said}; every user must be able to pass there"
            )
        await self.lay_out(spec.files)

    async def _dispose(self) -> None:
        """The agent ends what it started when its socket is closed, and then itself."""
        try:
            await asyncio.wait_for(self._agent.wait(), _STOP_TIMEOUT_S)
        except TimeoutError:
            self._agent.kill()
            await self._agent.wait()
        if self._agent.returncode != 0:
            await asyncio.to_thread(_end_remains, self._folder)
        await asyncio.to_thread(remove_tree, self._folder)


class ProcessBackend:
    """Satisfies SandboxBackend. Makes one folder for its sandboxes, below `root` (default: in memory, /dev/shm).

    `allow_network` says that commands may reach whatever network this machine reaches, whatever a spec asks for.
    """

    def __init__(self, root: Path | None = None, *, allow_network: bool = False):
        allow_many()
        sweep(root)
        self._folder = make_folder(root, Owner.this_process().label(_KIND))
        self._folder.chmod(0o711)
        self._allow_network = allow_network
        self._uids = itertools.count(secrets.randbelow(len(_FREE_UIDS)))
        self._numbers = itertools.count()
        self._live: set[ProcessSandbox] = set()

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            isolation="process",
            untrusted=False,
            network_none=self._allow_network,
            forward_sockets=False,
            memory_limit="process",
            connect=True,
        )

    @contextlib.asynccontextmanager
    async def acquire(self, spec: SandboxSpec) -> AsyncIterator[ProcessSandbox]:
        self.capabilities.check(spec, backend="process")
        sandbox = await self._start(spec)
        try:
            await sandbox.begin(spec)
            yield sandbox
        finally:
            self._live.discard(sandbox)
            await asyncio.shield(sandbox.stop())

    async def drop(self, snapshot: Snapshot) -> None:
        raise SandboxError(f"the process backend made no snapshot {snapshot.id!r}")

    async def stop(self) -> None:
        await asyncio.gather(*(sandbox.stop() for sandbox in self._live))
        self._live.clear()
        await asyncio.to_thread(remove_tree, self._folder)

    async def _start(self, spec: SandboxSpec) -> ProcessSandbox:
        folder = self._folder / str(next(self._numbers))
        with enough_for_a_sandbox():
            ours, theirs = socket.socketpair()
        try:
            settings = self._prepare(folder, spec)
            with enough_for_a_sandbox(), open(folder / "agent.log", "wb") as log:
                agent = await asyncio.create_subprocess_exec(
                    sys.executable, "-I", "-S", *inside.__path__, str(theirs.fileno()),
                    pass_fds=[theirs.fileno()], stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env={},
                    cwd=folder / "work", start_new_session=True,
                )  # fmt: skip
        except BaseException as error:
            ours.close()
            await asyncio.shield(asyncio.to_thread(remove_tree, folder))
            if isinstance(error, OSError):
                raise SandboxError(f"no sandbox could be made below {self._folder}: {error}") from error
            raise
        finally:
            theirs.close()
        try:
            connection = await Connection.over(ours, settings)
        except BaseException:
            ours.close()
            with contextlib.suppress(ProcessLookupError):
                agent.kill()
            await asyncio.shield(asyncio.to_thread(remove_tree, folder))
            raise
        sandbox = ProcessSandbox(folder, agent, connection, spec)
        self._live.add(sandbox)
        return sandbox

    def _prepare(self, folder: Path, spec: SandboxSpec) -> Settings:
        """Makes the folder. As root it, and all that happens in it, belongs to an id that nobody else has."""
        work, temporary = folder / "work", folder / "tmp"
        folder.mkdir(mode=0o711)
        for path in (work, temporary):
            path.mkdir(mode=0o700)
        settings = settings_for(spec, str(work))
        uid = None
        if os.geteuid() == 0:
            uid = _FREE_UIDS[next(self._uids) % len(_FREE_UIDS)]
            for path in (work, temporary):
                os.chown(path, uid, uid)
        else:
            settings.rlimits["NPROC"] += _num_threads(os.geteuid())
        return replace(
            settings,
            uid=uid,
            env={**settings.env, "TMPDIR": str(temporary), **spec.env},
            is_init=True,
            confinement=Confinement(
                readable=(*_READABLE, os.path.realpath(sys.base_prefix), *inside.__path__),
                writable=(str(work), str(temporary), *_DEVICES),
            ),
        )


def _num_threads(uid: int) -> int:
    """Of all that a user runs: the kernel counts a limit on processes over that."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == uid:
                count += len(os.listdir(path / "task"))
    return count


def sweep(root: Path | None) -> list[Path]:
    """Ends and removes what owners of the same user have left that have died. Returns what it removed."""
    left = list(left_over_folders(root, _KIND))
    for folder in left:
        _end_remains(folder)
        remove_tree(folder)
    return left


def _end_remains(folder: Path) -> None:
    """Kills what still has the folder in its environment, until there is nothing. Only for what a killed agent left."""
    deadline, found = time.monotonic() + _STOP_TIMEOUT_S, True
    while found and time.monotonic() < deadline:
        found = False
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"={folder}/".encode() in (path / "environ").read_bytes():
                    found = True
                    os.kill(int(path.name), 9)
