"""A seccomp filter: system calls that shell commands have no use for and that kernels are attacked through.

Numbers: the kernel's syscall tables of x86_64 and of arm64; program format: linux/filter.h and linux/seccomp.h.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Sequence

_DENIED = {
    "x86_64": {
        "uselib": 134, "sysfs": 139, "ptrace": 101, "syslog": 103, "pivot_root": 155, "adjtimex": 159, "chroot": 161,
        "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
        "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "quotactl": 179, "lookup_dcookie": 212,
        "clock_settime": 227, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
        "move_pages": 279, "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303,
        "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310,
        "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320, "bpf": 321,
        "userfaultfd": 323,
    },
    "aarch64": {
        "lookup_dcookie": 18, "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "quotactl": 60, "acct": 89,
        "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106, "clock_settime": 112,
        "syslog": 116, "ptrace": 117, "reboot": 142, "settimeofday": 170, "adjtimex": 171, "add_key": 217,
        "request_key": 218, "keyctl": 219, "swapon": 224, "swapoff": 225, "move_pages": 239, "perf_event_open": 241,
        "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "bpf": 280,
        "userfaultfd": 282, "kexec_file_load": 294,
    },
}  # fmt: skip
_DENIED_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "process_madvise": 440,
    "mount_setattr": 442, "quotactl_fd": 443, "memfd_secret": 447,
}  # fmt: skip
_GIVING_AWAY = {
    "x86_64": {"chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "setgroups": 116},
    "aarch64": {"fchownat": 54, "fchown": 55, "setgroups": 159},
}
_ON_A_PROCESS = {
    "x86_64": ({"sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203, "migrate_pages": 256,
                "prlimit64": 302, "sched_setattr": 314}, {"setpriority": 141, "ioprio_set": 251}),
    "aarch64": ({"sched_setparam": 118, "sched_setscheduler": 119, "sched_setaffinity": 122, "migrate_pages": 238,
                 "prlimit64": 261, "sched_setattr": 274}, {"setpriority": 140, "ioprio_set": 30}),
}  # fmt: skip
"""What a process may do to another one of the same user, by which argument names that one: the first, the second. Done
to a sandbox's agent it would pass for a failure of the infrastructure."""
_AGENT = 1
"""The process id of the agent, as it is seen in its sandbox."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_SOCKET = {"x86_64": 41, "aarch64": 198}
_CLONE3 = 435
_CLONE_NEWUSER = 0x10000000
_X32_BIT = 0x40000000
_TERMINAL_INPUT = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX: typing into a terminal that others read from."""
_FAMILIES = (1, 2, 10, 16)
"""Unix, IPv4, IPv6, netlink: those that a network namespace confines. Others, such as vsock, lead to the host."""

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGUMENT_OFFSETS = 0, 4, (16, 24)


def filter_program(*, pretends_to_give_away: bool = False) -> bytes:
    """The filter for this machine; empty on a machine whose system call numbers are not listed here.

    `pretends_to_give_away`: chown and its kin, and setgroups, do nothing and say that they succeeded. Where there is
    but one id of user and group they could only fail, and with them every package whose files belong to a group of
    their own, and every program of root's that starts others with their groups, such as xterm.
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
    for argument, numbers in enumerate(_ON_A_PROCESS[machine]):
        for number in numbers.values():
            program += _examine(number, argument, _return_if(_EQUAL, _AGENT, refuse), otherwise=_ALLOW)
    program += _examine(_CLONE[machine], 0, _return_if(_ANY_BIT, _CLONE_NEWUSER, refuse), otherwise=_ALLOW)
    typing = [part for request in _TERMINAL_INPUT for part in _return_if(_EQUAL, request, refuse)]
    program += _examine(_IOCTL[machine], 1, typing, otherwise=_ALLOW)
    known = [part for family in _FAMILIES for part in _return_if(_EQUAL, family, _ALLOW)]
    program += _examine(_SOCKET[machine], 0, known, otherwise=_ERRNO | errno.EAFNOSUPPORT)
    return b"".join([*program, _instruction(_RETURN, _ALLOW)])


def _examine(number: int, argument: int, tests: Sequence[bytes], otherwise: int) -> list[bytes]:
    """For one system call: `tests` on the low half of an argument, then `otherwise`. Others go past it."""
    return [
        _instruction(_EQUAL, number, if_false=len(tests) + 2),
        _instruction(_LOAD, _ARGUMENT_OFFSETS[argument]),
        *tests,
        _instruction(_RETURN, otherwise),
    ]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _return_if(test: int, value: int, result: int) -> list[bytes]:
    return [_instruction(test, value, if_false=1), _instruction(_RETURN, result)]
