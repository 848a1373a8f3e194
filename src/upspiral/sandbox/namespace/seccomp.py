"""A seccomp filter: system calls that shell commands have no use for and that kernels are attacked through.

Numbers: the kernel's syscall tables of x86_64 and of arm64; program format: linux/filter.h and linux/seccomp.h.
"""

from __future__ import annotations

import errno
import platform
import struct

_DENIED = {
    "x86_64": {
        "ptrace": 101, "syslog": 103, "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166,
        "init_module": 175, "delete_module": 176, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
        "unshare": 272, "perf_event_open": 298, "name_to_handle_at": 303, "open_by_handle_at": 304, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313, "kexec_file_load": 320, "bpf": 321,
        "userfaultfd": 323,
    },
    "aarch64": {
        "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "unshare": 97, "kexec_load": 104,
        "init_module": 105, "delete_module": 106, "syslog": 116, "ptrace": 117, "add_key": 217, "request_key": 218,
        "keyctl": 219, "perf_event_open": 241, "name_to_handle_at": 264, "open_by_handle_at": 265, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "finit_module": 273, "bpf": 280, "userfaultfd": 282,
        "kexec_file_load": 294,
    },
}  # fmt: skip
_DENIED_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip
_GIVING_AWAY = {
    "x86_64": {"chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260},
    "aarch64": {"fchownat": 54, "fchown": 55},
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_CLONE_NEWUSER = 0x10000000
_X32_BIT = 0x40000000

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_OFFSET, _ARCH_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def filter_program(*, pretends_to_give_away: bool = False) -> bytes:
    """The filter for this machine; empty on a machine whose system call numbers are not listed here.

    `pretends_to_give_away`: chown and its kin do nothing and say that they succeeded. Where there is but one user id
    they could only fail, and with them every package whose files belong to a group of their own.
    """
    machine = platform.machine()
    if machine not in _DENIED:
        return b""
    refuse, no_such_call = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    program = [
        _instruction(_LOAD, _ARCH_OFFSET),
        _instruction(_EQUAL, _AUDIT_ARCH[machine], if_true=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_OFFSET),
        # clone3 passes its flags by a pointer that no filter can read. C libraries fall back to clone on ENOSYS.
        *_return_if(_EQUAL, _CLONE3, no_such_call),
        *_return_if(_GREATER_EQUAL, _X32_BIT, no_such_call),
    ]
    for number in sorted({*_DENIED[machine].values(), *_DENIED_EVERYWHERE.values()}):
        program += _return_if(_EQUAL, number, refuse)
    if pretends_to_give_away:
        for number in _GIVING_AWAY[machine].values():
            program += _return_if(_EQUAL, number, _ERRNO)
    program += [
        _instruction(_EQUAL, _CLONE[machine], if_false=3),
        _instruction(_LOAD, _FIRST_ARGUMENT_OFFSET),
        *_return_if(_ANY_BIT, _CLONE_NEWUSER, refuse),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _return_if(test: int, value: int, result: int) -> list[bytes]:
    return [_instruction(test, value, if_false=1), _instruction(_RETURN, result)]
