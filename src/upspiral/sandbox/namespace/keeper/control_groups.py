"""Control groups: limits on a sandbox as a whole, where the keeper may make groups (version 1 or 2 of them)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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

    folders: Sequence[Path]
    out_of_memory: Path
    """The file that has a line "oom_kill N"."""
    freezer: Path
    """The file that is written to stop and to go on."""

    def add(self, process: int) -> None:
        for folder in self.folders:
            _write(folder / "cgroup.procs", process)

    def freeze(self, deadline: float) -> None:
        """Returns when all of its processes have stopped."""
        frozen = "1" if self._is_v2 else "FROZEN"
        _write(self.freezer, frozen)
        while not self._is_frozen():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.freezer}: the processes of the sandbox could not be stopped in time")
            time.sleep(0.0005)

    def thaw(self) -> None:
        _thaw(self.freezer)

    @property
    def _is_v2(self) -> bool:
        return self.freezer.name == "cgroup.freeze"

    def _is_frozen(self) -> bool:
        if self._is_v2:
            return "frozen 1" in self.freezer.with_name("cgroup.events").read_text()
        return self.freezer.read_text().strip() == "FROZEN"

    def remove(self) -> None:
        """After its last process; the kernel may need a moment to see that it was the last."""
        deadline = time.monotonic() + _REMOVE_TIMEOUT_S
        for folder in self.folders:
            _remove(folder, deadline)


class Hierarchies:
    """Where groups are made: below one folder a hierarchy, which carries its owner's label."""

    def __init__(self, folders: Mapping[str, Path], version: int):
        self._folders = folders
        self._version = version

    def make(self, name: str, allowance: Allowance) -> Group:
        if self._version == 2:
            return self._make_v2(self._folders["memory"] / name, allowance)
        folders = {}
        for controller in self._folders:
            if controller != "cpu" or allowance.cpus is not None:
                folders[controller] = self._folders[controller] / name
                folders[controller].mkdir()
        _write(folders["memory"] / "memory.limit_in_bytes", allowance.memory_bytes)
        with suppress(OSError):  # only where swap is accounted
            _write(folders["memory"] / "memory.memsw.limit_in_bytes", allowance.memory_bytes)
        _write(folders["pids"] / "pids.max", allowance.processes + 1)
        if allowance.cpus is not None:
            _write(folders["cpu"] / "cpu.cfs_period_us", _CPU_PERIOD_US)
            _write(folders["cpu"] / "cpu.cfs_quota_us", int(allowance.cpus * _CPU_PERIOD_US))
        return Group(
            list(folders.values()), folders["memory"] / "memory.oom_control", folders["freezer"] / "freezer.state"
        )

    def _make_v2(self, folder: Path, allowance: Allowance) -> Group:
        folder.mkdir()
        _write(folder / "memory.max", allowance.memory_bytes)
        with suppress(OSError):
            _write(folder / "memory.swap.max", 0)
        _write(folder / "pids.max", allowance.processes + 1)
        if allowance.cpus is not None:
            _write(folder / "cpu.max", f"{int(allowance.cpus * _CPU_PERIOD_US)} {_CPU_PERIOD_US}")
        return Group([folder], folder / "memory.events", folder / "cgroup.freeze")

    def remove(self) -> None:
        for folder in set(self._folders.values()):
            remove_all(folder)


def remove_all(folder: Path) -> None:
    """A group and those below it, whose processes are dead or dying."""
    deadline = time.monotonic() + _REMOVE_TIMEOUT_S
    with suppress(OSError):
        for below in folder.iterdir():
            if below.is_dir():
                with suppress(FileNotFoundError):
                    _thaw(below / "freezer.state")  # what is frozen does not die
                _remove(below, deadline)
    _remove(folder, deadline)


def _remove(folder: Path, deadline: float) -> None:
    while True:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                return  # the next start sweeps it
            time.sleep(0.002)
        else:
            return


def _thaw(freezer: Path) -> None:
    _write(freezer, "0" if freezer.name == "cgroup.freeze" else "THAWED")


def _write(path: Path, value: object) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def find_hierarchies(label: str, parent: str | None) -> Hierarchies | None:
    """Makes the folders of this owner, below `parent` in each hierarchy or below the group that this process is in, so
    that what limits this process still limits its sandboxes. None where that is not to be had."""
    places = mounted_hierarchies()
    own = _own_groups()
    if "" in places and (folder := _make_v2_owner(places[""], own.get("", "/"), parent, label)):
        return Hierarchies({"memory": folder}, version=2)
    if not set(_CONTROLLERS) <= places.keys():
        return None
    folders = {}
    try:
        for controller in _CONTROLLERS:
            above = places[controller] / (parent or own.get(controller, "/")).strip("/")
            folders[controller] = (above if above.is_dir() else places[controller]) / label
            folders[controller].mkdir(exist_ok=True)
    except OSError:
        for folder in folders.values():
            _remove(folder, deadline=0.0)
        return None
    return Hierarchies(folders, version=1)


def _make_v2_owner(place: Path, own: str, parent: str | None, label: str) -> Path | None:
    """A group with processes of its own cannot hand controllers on, so the group above it is tried, too."""
    above = place / own.strip("/")
    candidates = [place / parent.strip("/")] if parent else [above, *above.parents]
    for candidate in candidates:
        if not candidate.is_relative_to(place):
            break
        folder = candidate / label
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            wanted = " ".join(f"+{each}" for each in _CONTROLLERS_V2)
            for group in (candidate, folder):
                if not set(_CONTROLLERS_V2) <= set((group / "cgroup.subtree_control").read_text().split()):
                    _write(group / "cgroup.subtree_control", wanted)
        except OSError:
            _remove(folder, deadline=0.0)
        else:
            return folder
    return None


def mounted_hierarchies() -> Mapping[str, Path]:
    """Controller -> where its hierarchy is mounted; "" for version 2."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options = line.split()[:4]
        if kind == "cgroup2":
            found.setdefault("", Path(place))
        elif kind == "cgroup":
            for controller in set(_CONTROLLERS) & set(options.split(",")):
                found.setdefault(controller, Path(place))
    return found


def _own_groups() -> Mapping[str, str]:
    own: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    return own
