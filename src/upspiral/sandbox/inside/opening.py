"""Opening a file by a path that others have a hand in."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_OPENAT2, _AT_FDCWD, _RESOLVE_NO_MAGICLINKS = 437, -100, 2
_UNAVAILABLE = (errno.ENOSYS, errno.EPERM)
"""Before Linux 5.6, and by filters of system calls that do not know it."""

_libc = ctypes.CDLL(None, use_errno=True)


def open_plainly(path: str, flags: int, mode: int = 0) -> int:
    """As os.open, but not by the links in /proc that are no paths: those to this process's own descriptors lead it to
    what nobody else may open. OSError (ELOOP) when the path has one."""
    how = struct.pack("=QQQ", flags, mode if flags & os.O_CREAT else 0, _RESOLVE_NO_MAGICLINKS)
    descriptor = _libc.syscall(_OPENAT2, _AT_FDCWD, os.fsencode(path), how, ctypes.c_size_t(len(how)))
    if descriptor >= 0:
        return descriptor
    code = ctypes.get_errno()
    if code in _UNAVAILABLE:
        return os.open(path, flags, mode)
    raise OSError(code, os.strerror(code))
