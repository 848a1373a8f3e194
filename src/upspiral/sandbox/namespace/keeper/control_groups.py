"""Control groups: limits on a sandbox as a whole, where the keeper may make groups (version 1 or 2 of them)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

_CPU_PERIOD_US = 100_000
_REMOVE_TIMEOUT_S = 2.0
_CONTROLLERS = ("memory", "pids", "cpu", "freezer")
_CONTROLLERS_V2 = ("memory", "pids", "cpu")


@dataclass(frozen=True, slots=True)
class Allowance:
    memory_bytes: int
    processes: int
    cpus: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """One sandbox's: a folder in each hierarchy (version 1) or one folder (version 2)."""

    folders: Sequence[str]
    out_of_memory: str
    """The file that has a line "oom_kill N"."""
    freezer: str
    """The file that is written to stop and to go on."""

    def open_birthplace(self) -> int | None:
        """A folder for `syscalls.clone` (version 2). None: the child is to `enter`.

        Whoever moves another process waits until no processor can be amid a fork any more, which takes 10 ms and more.
        Neither who is born in a group nor who moves itself alone has to.
        """
        return os.open(self.folders[0], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if self._is_v2 else None

    def clone(self) -> int:
        """Forks (`syscalls.clone`); the child is to `enter`."""
        from upspiral.sandbox.namespace.keeper import syscalls  # of Linux; hosts import this module wherever they are

        birthplace = self.open_birthplace()
        try:
            return syscalls.clone(0, birthplace)
        finally:
            if birthplace is not None:
                os.close(birthplace)

    @property
    def entrances(self) -> Sequence[str]:
        """Files to which a child that was not born in the group writes 0, before anything that counts. It must have one
        thread."""
        return () if self._is_v2 else [f"{folder}/tasks" for folder in self.folders]

    def enter(self) -> None:
        for entrance in self.entrances:
            _write(entrance, 0)

    def freeze(self, deadline: float) -> None:
        """Returns when all of its processes have stopped."""
        _write(self.freezer, "1" if self._is_v2 else "FROZEN")
        while not self._is_frozen():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.freezer}: the processes of the sandbox could not be stopped in time")
            time.sleep(0.0005)

    def thaw(self) -> None:
        _thaw(self.freezer)

    def remove(self) -> None:
        """After its last process; the kernel may need a moment to see that it was the last."""
        deadline = time.monotonic() + _REMOVE_TIMEOUT_S
        for folder in self.folders:
            _remove(folder, deadline)

    @property
    def _is_v2(self) -> bool:
        return self.freezer.endswith("/cgroup.freeze")

    def _is_frozen(self) -> bool:
        if self._is_v2:
            return "frozen 1" in _read(f"{self.folders[0]}/cgroup.events")
        return _read(self.freezer).strip() == "FROZEN"


class Hierarchies:
    """Where groups are made: below one folder a hierarchy, which carries its owner's label."""

    def __init__(self, folders: Mapping[str, str], version: int):
        self._folders = folders
        self._version = version

    def make(self, name: str, allowance: Allowance) -> Group:
        quota_us = None if allowance.cpus is None else int(allowance.cpus * _CPU_PERIOD_US)
        if self._version == 2:
            return self._make_v2(f"{self._folders['memory']}/{name}", allowance, quota_us)
        used = [controller for controller in self._folders if controller != "cpu" or quota_us is not None]
        folders = {controller: f"{self._folders[controller]}/{name}" for controller in used}
        counter, freezer = f"{folders['memory']}/memory.oom_control", f"{folders['freezer']}/freezer.state"
        group = Group(list(folders.values()), counter, freezer)
        with _removed_unless_made(group):
            for folder in group.folders:
                os.mkdir(folder)
            self._limit_v1(folders, allowance, quota_us)
        return group

    def _limit_v1(self, folders: Mapping[str, str], allowance: Allowance, quota_us: int | None) -> None:
        _write(f"{folders['memory']}/memory.limit_in_bytes", allowance.memory_bytes)
        with suppress(OSError):  # only where swap is accounted
            _write(f"{folders['memory']}/memory.memsw.limit_in_bytes", allowance.memory_bytes)
        _write(f"{folders['pids']}/pids.max", allowance.processes)
        if quota_us is not None:
            _write(f"{folders['cpu']}/cpu.cfs_period_us", _CPU_PERIOD_US)
            _write(f"{folders['cpu']}/cpu.cfs_quota_us", quota_us)

    def _make_v2(self, folder: str, allowance: Allowance, quota_us: int | None) -> Group:
        group = Group([folder], f"{folder}/memory.events", f"{folder}/cgroup.freeze")
        with _removed_unless_made(group):
            os.mkdir(folder)
            _write(f"{folder}/memory.max", allowance.memory_bytes)
            with suppress(OSError):
                _write(f"{folder}/memory.swap.max", 0)
            _write(f"{folder}/pids.max", allowance.processes)
            if quota_us is not None:
                _write(f"{folder}/cpu.max", f"{quota_us} {_CPU_PERIOD_US}")
        return group

    def can_be_entered(self) -> bool:
        """Tries it with a process: who may make groups may not always have processes in them."""
        try:
            group = self.make("trial", Allowance(memory_bytes=1 << 30, processes=8, cpus=1.0))
            child = group.clone()
        except OSError:
            return False
        if child == 0:
            _exit_in(group)
        entered = os.waitpid(child, 0)[1] == 0
        group.remove()
        return entered

    def remove(self) -> None:
        for folder in set(self._folders.values()):
            remove_all(folder)


def _exit_in(group: Group) -> NoReturn:
    try:
        group.enter()
        os._exit(0)
    finally:
        os._exit(1)


@contextmanager
def _removed_unless_made(group: Group) -> Iterator[None]:
    """The kernel may refuse a limit, such as more cores than the group above has."""
    try:
        yield
    except OSError:
        group.remove()
        raise


def remove_all(folder: str) -> None:
    """A group and those below it, whose processes are dead or dying."""
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    with suppress(OSError):
        for below in [entry.path for entry in os.scandir(folder) if entry.is_dir()]:
            _thaw(f"{below}/freezer.state")  # what is frozen does not die
            _remove(below, deadline)
    _remove(folder, deadline)


def find_hierarchies(label: str, parent: str | None) -> Hierarchies | None:
    """Makes the folders of this owner, below `parent` in each hierarchy or below the group that this process is in, so
    that what limits this process still limits its sandboxes. None where that is not to be had."""
    found = _find(label, parent)
    if found is not None and not found.can_be_entered():
        found.remove()
        return None
    return found


def _find(label: str, parent: str | None) -> Hierarchies | None:
    places, own = mounted_hierarchies(), _own_groups()
    if "" in places and (folder := _make_v2_owner(places[""], own.get("", "/"), parent, label)):
        return Hierarchies({"memory": folder}, version=2)
    if not set(_CONTROLLERS) <= places.keys():
        return None
    folders: dict[str, str] = {}
    try:
        for controller in _CONTROLLERS:
            above = _below(places[controller], parent or own.get(controller, "/"))
            folder = f"{above if os.path.isdir(above) else places[controller]}/{label}"
            os.mkdir(folder)
            folders[controller] = folder
    except OSError:
        for folder in folders.values():
            _remove(folder, deadline=0.0)
        return None
    return Hierarchies(folders, version=1)


def _make_v2_owner(place: str, own: str, parent: str | None, label: str) -> str | None:
    """A group with processes of its own cannot hand controllers on, so the groups above it are tried, too."""
    candidate = _below(place, parent or own)
    while candidate.startswith(place):
        folder = f"{candidate}/{label}"
        with suppress(OSError):
            os.mkdir(folder)
            try:
                _enable_controllers(candidate)
                _enable_controllers(folder)
            except OSError:
                _remove(folder, deadline=0.0)
                raise
            return folder
        if parent:
            break
        candidate = os.path.dirname(candidate)
    return None


def _enable_controllers(folder: str) -> None:
    if not set(_CONTROLLERS_V2) <= set(_read(f"{folder}/cgroup.subtree_control").split()):
        _write(f"{folder}/cgroup.subtree_control", " ".join(f"+{each}" for each in _CONTROLLERS_V2))


def mounted_hierarchies() -> Mapping[str, str]:
    """Controller -> where its hierarchy is mounted; "" for version 2."""
    found: dict[str, str] = {}
    for line in _read("/proc/self/mounts").splitlines():
        _, place, kind, options = line.split()[:4]
        if kind == "cgroup2":
            found.setdefault("", place)
        elif kind == "cgroup":
            for controller in set(_CONTROLLERS) & set(options.split(",")):
                found.setdefault(controller, place)
    return found


def _own_groups() -> Mapping[str, str]:
    own: dict[str, str] = {}
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    return own


def _below(place: str, path: str) -> str:
    return os.path.join(place, path.strip("/")).rstrip("/")


def _remove(folder: str, deadline: float) -> None:
    while True:
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                return  # the next start sweeps it
            time.sleep(0.002)
        else:
            return


def _thaw(freezer: str) -> None:
    with suppress(FileNotFoundError):  # gone already
        _write(freezer, "0" if freezer.endswith("/cgroup.freeze") else "THAWED")


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _write(path: str, value: object) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)
