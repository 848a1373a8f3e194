"""Giving up rights for good where no keeper does it: Landlock (linux/landlock.h), seccomp, and being asked about
orphans."""

from __future__ import annotations

import ctypes
import os
import struct

from .settings import Confinement

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
_SECCOMP_MODE_FILTER = 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1
_READ = (1 << 0) | (1 << 2) | (1 << 3)
"""Execute, read a file, read a folder."""
_FILE_ONLY = (1 << 0) | (1 << 1) | (1 << 2) | (1 << 14) | (1 << 15)
"""What can be said of something that is no folder."""
_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
_SCOPES_ABI = 6
_ALL_SCOPES = 0b11
"""Abstract unix sockets and signals lead to nobody outside."""

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_abi() -> int:
    """The version that the kernel has; 0: none."""
    return max(0, _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION))


def forbid_inspection() -> None:
    """Nobody of the same user can trace this process, or read and write its memory."""
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def adopt_orphans() -> None:
    """Whoever loses its parent below becomes a child of this process."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def confine(confinement: Confinement) -> None:
    """Of this process and all that it starts. Raises OSError when the kernel refuses, unless it has no Landlock."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    abi = landlock_abi()
    if abi and confinement.readable + confinement.writable:
        _restrict_files(confinement, abi)
    if confinement.system_calls:
        _restrict_system_calls(bytes.fromhex(confinement.system_calls))


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _restrict_system_calls(program: bytes) -> None:
    described = _Program(len(program) // 8, program)
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0))


def _restrict_files(confinement: Confinement, abi: int) -> None:
    everything = _ALL_BY_ABI[min(abi, max(_ALL_BY_ABI))]
    attributes = struct.pack("=QQQ", everything, 0, _ALL_SCOPES if abi >= _SCOPES_ABI else 0)
    attributes = attributes[: 24 if abi >= _SCOPES_ABI else 16 if abi >= 4 else 8]
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        for path in confinement.readable:
            _allow(ruleset, path, _READ)
        for path in confinement.writable:
            _allow(ruleset, path, everything)
        _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    """What is not there, or out of this user's reach, needs no leave."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return
    try:
        if not os.path.isdir(path):
            access &= _FILE_ONLY
        rule = struct.pack("=Qi", access, descriptor)
        _checked(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(descriptor)


def _checked(answer: int) -> int:
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"what it may do cannot be restricted: {os.strerror(code)}")
    return answer
