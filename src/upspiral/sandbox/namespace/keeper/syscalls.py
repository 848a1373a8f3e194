"""The system calls that the standard library does not have, each raising OSError that names what was tried.

All calls keep the interpreter's lock: there is one thread, and `clone` must not let go of it half-way.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from enum import IntFlag

_libc = ctypes.PyDLL(None, use_errno=True)
_before_fork, _after_fork_in_child, _after_fork_in_parent = (
    getattr(ctypes.pythonapi, f"PyOS_{name}Fork{whom}")
    for name, whom in (("Before", ""), ("After", "_Child"), ("After", "_Parent"))
)
# Looked up here, once: what a sandbox does for the first time it does in memory of its own.
_syscall, _mount, _unmount, _unshare, _prctl, _sethostname = (
    _libc.syscall, _libc.mount, _libc.umount2, _libc.unshare, _libc.prctl, _libc.sethostname,
)  # fmt: skip
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_ARCHITECTURE = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), 0)
_CLONE, _PIVOT_ROOT, _CAPSET = ((56, 220)[_ARCHITECTURE], (155, 41)[_ARCHITECTURE], (126, 91)[_ARCHITECTURE])
_OPEN_TREE, _MOVE_MOUNT, _CLONE3, _CLOSE_RANGE, _MOUNT_SETATTR = 428, 429, 435, 436, 442
_SIGCHLD = 17
_CLONE_PARENT, _CLONE_INTO_CGROUP = 0x8000, 0x200000000

_AT_FDCWD = -100
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_FROM_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV, _MOUNT_ATTR_IDMAP = 1, 2, 4, 0x100000
_MNT_DETACH = 2
_OWN_CAPABILITIES, _NO_CAPABILITIES = struct.pack("=Ii", 0x20080522, 0), bytes(24)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_SECCOMP_MODE_FILTER = 2
CAP_SYS_PTRACE = 19


class Namespace(IntFlag):
    MOUNT = 0x00020000
    CGROUP = 0x02000000
    UTS = 0x04000000
    IPC = 0x08000000
    USER = 0x10000000
    PID = 0x20000000
    NETWORK = 0x40000000


class MountFlag(IntFlag):
    READ_ONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    REMOUNT = 32
    BIND = 4096
    RECURSIVE = 16384
    PRIVATE = 1 << 18


def _check(result: int, what: str, flags: IntFlag | None = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}{'' if flags is None else f' {flags!r}'}: {os.strerror(code)}")
    return result


def clone(namespaces: int, control_group: int | None = None, *, for_parent: bool = False) -> int:
    """Forks, with the child in new namespaces and in the control group (version 2) of an open folder at once. Returns 0
    in the child, else the child's id. `for_parent`: it becomes a child of this process' own parent.

    One fork where unshare needs two: only children come into a new pid namespace. To be called from the one thread.
    """
    flags, signal = (namespaces | _CLONE_PARENT, 0) if for_parent else (namespaces, _SIGCHLD)
    _before_fork()
    if control_group is None:
        process = _syscall(_CLONE, ctypes.c_ulong(flags | signal), None, None, None, None)
    else:
        wanted = struct.pack("=11Q", flags | _CLONE_INTO_CGROUP, 0, 0, 0, signal, *[0] * 5, control_group)
        process = _syscall(_CLONE3, wanted, ctypes.c_size_t(len(wanted)))
    if process == 0:
        _after_fork_in_child()
        return 0
    _after_fork_in_parent()
    if process < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"clone {Namespace(namespaces)!r}: {os.strerror(code)}")
    return process


def unshare(namespaces: Namespace) -> None:
    _check(_unshare(int(namespaces)), "unshare", namespaces)


def enter(namespace: int, kind: Namespace) -> None:
    """Enters the namespace of an open descriptor (setns)."""
    _check(_libc.setns(namespace, int(kind)), f"setns {kind!r}")


def mount(source: str, target: str, kind: str, flags: MountFlag | int = 0, options: str = "") -> None:
    result = _mount(
        source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(int(flags)), options.encode() or None
    )
    _check(result, f"mount {kind or source} at {target}" + (f" with {options}" if options else ""))


def bind(source: str, target: str) -> None:
    """The tree of mounts at `source`, seen at `target`, too."""
    flags = ctypes.c_ulong(MountFlag.BIND | MountFlag.RECURSIVE)
    _check(_mount(os.fsencode(source), os.fsencode(target), None, flags, None), f"bind {source} at {target}")


def make_private(target: str) -> None:
    flags = ctypes.c_ulong(MountFlag.PRIVATE | MountFlag.RECURSIVE)
    _check(_mount(None, os.fsencode(target), None, flags, None), f"make {target} private")


def unmount(target: str) -> None:
    """At once for new users; the kernel frees it when the last open file is closed."""
    _check(_unmount(os.fsencode(target), _MNT_DETACH), f"unmount {target}")


def clone_tree(path: str) -> int:
    """A descriptor of a copy of the mounts from `path` down. They go when the last descriptor is closed."""
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    return _check(_syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags), f"open_tree {path}")


def attach(tree: int, target: str) -> None:
    """Puts the mounts of a descriptor at a path. They then live as long as the mount namespace."""
    result = _syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_FROM_EMPTY_PATH)
    _check(result, f"move_mount to {target}")


def protect(tree: int) -> None:
    """Nothing below can be written, no setuid bit and no device node counts."""
    _set_attributes(tree, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, 0)


def map_owners(tree: int, user_namespace: int) -> None:
    """Shows the files of a detached tree as owned by the ids that the user namespace maps theirs to (Linux 5.19)."""
    _set_attributes(tree, _MOUNT_ATTR_IDMAP, user_namespace)


def _set_attributes(tree: int, attributes: int, user_namespace: int) -> None:
    wanted = struct.pack("=QQQQ", attributes, 0, 0, user_namespace)
    flags = _AT_EMPTY_PATH | _AT_RECURSIVE
    result = _syscall(_MOUNT_SETATTR, tree, b"", flags, wanted, len(wanted))
    _check(result, f"mount_setattr {attributes:#x}")


def pivot_root() -> None:
    """Makes the working directory, which must be a mount, the root; the old one stays the working directory."""
    _check(_syscall(_PIVOT_ROOT, b".", b"."), "pivot_root")


def drop_old_root() -> None:
    """After `pivot_root`: with all that is mounted below."""
    unmount(".")
    os.chdir("/")


def set_hostname(name: str) -> None:
    _check(_sethostname(name.encode(), len(name.encode())), "sethostname")


def close_from(first: int, kept: set[int]) -> None:
    """Closes every descriptor from `first` on but those."""
    for descriptor in sorted(kept):
        if descriptor > first:
            _check(_syscall(_CLOSE_RANGE, first, descriptor - 1, 0), "close_range")
        first = max(first, descriptor + 1)
    _check(_syscall(_CLOSE_RANGE, first, ctypes.c_uint(-1), 0), "close_range")


def _control(option: int, first: int = 0, second: int = 0) -> int:
    return _prctl(option, first, second, 0, 0)


def die_with_parent(signal: int) -> None:
    """The signal comes when the parent's thread that forked this process ends."""
    _check(_control(_PR_SET_PDEATHSIG, signal), "PR_SET_PDEATHSIG")


def forbid_inspection() -> None:
    """No process of the same user can look into this one's memory, files or environment."""
    _check(_control(_PR_SET_DUMPABLE, 0), "PR_SET_DUMPABLE")


def forbid_new_privileges() -> None:
    _check(_control(_PR_SET_NO_NEW_PRIVS, 1), "PR_SET_NO_NEW_PRIVS")


def drop_capabilities() -> None:
    """All of them, for good, whatever is executed later."""
    capability = 0
    while _control(_PR_CAPBSET_DROP, capability) == 0:
        capability += 1
    _check(_control(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL), "PR_CAP_AMBIENT")
    _check(_syscall(_CAPSET, _OWN_CAPABILITIES, _NO_CAPABILITIES), "capset")


def has_capability(number: int) -> bool:
    """Of this thread, now."""
    with open("/proc/self/status") as file:
        effective = next(line for line in file if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


class Filter:
    """A seccomp filter (`namespace/seccomp.py`), laid out for the kernel beforehand."""

    def __init__(self, program: bytes):
        self._described = _Program(len(program) // 8, program)
        self._address = ctypes.addressof(self._described)

    def install(self) -> None:
        """For this process and everything that will descend from it."""
        _check(_control(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._address), "PR_SET_SECCOMP")
