"""Programs that run inside a sandbox and try what they must not be able to do."""

from __future__ import annotations

import shlex

CALLS = {
    "ptrace": (101, 16, 1, 0, 0), "mount": (165, 0, 0, 0, 0), "umount2": (166, 0, 2), "pivot_root": (155, 0, 0),
    "chroot": (161, 0), "unshare": (272, 0x10000000), "setns": (308, 0, 0), "clone3": (435, 0, 0),
    "io_uring_setup": (425, 8, 0), "bpf": (321, 0, 0, 0), "perf_event_open": (298, 0, 0, -1, -1, 0),
    "keyctl": (250, 0, -3, 1), "add_key": (248, 0, 0, 0, 0, 0), "request_key": (249, 0, 0, 0, 0),
    "init_module": (175, 0, 0, 0), "finit_module": (313, 0, 0, 0), "kexec_load": (246, 0, 0, 0, 0),
    "reboot": (169, 0xFEE1DEAD, 672274793, 0x89ABCDEF, 0), "swapon": (167, 0, 0), "acct": (163, 0),
    "settimeofday": (164, 0, 0), "clock_settime": (227, 0, 0), "adjtimex": (159, 0), "clock_adjtime": (305, 0, 0),
    "syslog": (103, 3, 0, 0), "iopl": (172, 3), "ioperm": (173, 0, 8, 1), "open_by_handle_at": (304, -100, 0, 0),
    "userfaultfd": (323, 0), "process_vm_readv": (310, 1, 0, 0, 0, 0, 0), "process_vm_writev": (311, 1, 0, 0, 0, 0, 0),
    "kcmp": (312, 1, 1, 0, 0, 0), "move_pages": (279, 1, 0, 0, 0, 0, 0), "quotactl": (179, 0, 0, 0, 0),
    "fanotify_init": (300, 0, 0), "open_tree": (428, -100, 0, 1), "fsopen": (430, 0, 0), "fsmount": (432, 0, 0, 0),
    "move_mount": (429, 0, 0, 0, 0, 0), "mount_setattr": (442, -100, 0, 0, 0, 0), "pidfd_getfd": (438, 0, 0, 0),
    "sethostname": (170, 0, 0), "setdomainname": (171, 0, 0), "x32 getpid": (0x40000000 + 39,),
}  # fmt: skip
"""Numbers of x86_64, and arguments; each must fail before it looks at them."""

ON_THE_AGENT = {
    "prlimit": (302, 1, 7, "limit", 0), "prlimit of cpu": (302, 1, 0, "limit", 0),
    "sched_setscheduler": (144, 1, 5, "zero"), "sched_setaffinity": (203, 1, 8, "one"),
    "setpriority": (141, 0, 1, 19), "ioprio_set": (251, 1, 1, 3 << 13),
}  # fmt: skip
"""What one process may do to another one of the same user, tried on PID 1."""

_CALL = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
buffers = {"limit": bytes(16), "zero": bytes(64), "one": (1).to_bytes(8, "little")}
for name, (number, *arguments) in %r.items():
    arguments = [buffers[each] if isinstance(each, str) else ctypes.c_long(each) for each in arguments]
    ctypes.set_errno(0)
    answer = libc.syscall(ctypes.c_long(number), *arguments)
    print(name, errno.errorcode[ctypes.get_errno()] if answer < 0 else "allowed", flush=True)
"""

SOCKETS = """
import socket
for family, kind, protocol in %r:
    try:
        socket.socket(family, kind, protocol)
        print(family, kind, protocol, "allowed")
    except OSError:
        pass
"""

REACH = """
import socket
for family, address in %r:
    with socket.socket(family, socket.SOCK_STREAM) as line:
        line.settimeout(3)
        try:
            line.connect(address)
            print("reached", address)
        except OSError:
            pass
try:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.sendto(b"x", ("10.0.0.1", 53))
        print("reached by UDP")
except OSError:
    pass
"""

TYPE_INTO_TERMINAL = """
import fcntl, os, pty, termios
master, slave = pty.openpty()
for name, request, argument in (("TIOCSTI", termios.TIOCSTI, b"x"), ("TIOCLINUX", 0x541C, bytes(8))):
    try:
        fcntl.ioctl(slave, request, argument)
        print(name, "allowed")
    except OSError:
        pass
"""

THE_32_BIT_DOOR = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))  # getpid, as a 32-bit program asks for it
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))(), flush=True)
"""

SIGNAL_THE_AGENT = """
import os, signal
for number in range(1, 65):
    try:
        os.kill(1, number)
    except OSError:
        pass
try:
    handle = os.pidfd_open(1)
    signal.pidfd_send_signal(handle, signal.SIGKILL)
    signal.pidfd_send_signal(handle, signal.SIGSTOP)
except OSError:
    pass
"""

OPEN_OF_THE_AGENT = """
import os
for name in ("mem", "environ", "maps", "exe", "root", "cwd", "fd/0", "fd/3", "auxv", "stack", "syscall", "pagemap"):
    for flags in (os.O_RDONLY, os.O_RDWR):
        try:
            os.close(os.open(f"/proc/1/{name}", flags))
            print(name, flags, "opened")
        except OSError:
            pass
for name in ("oom_score_adj", "coredump_filter", "clear_refs", "comm", "autogroup", "timerslack_ns", "uid_map", "loginuid"):
    try:
        with open(f"/proc/1/{name}", "w") as file:
            file.write("19")
        print(name, "written")
    except OSError:
        pass
"""

MANY_SMALL_HOARDERS = (
    "hoard() { (echo 0 > /proc/self/oom_score_adj; exec tail /dev/zero) 2>/dev/null; }; "
    "for i in {1..25}; do (for j in 1 2; do hoard; done) & done; wait; echo over"
)
"""`tail` keeps all of a line that has no end. Each begins with a few hundred KB, and asks to be spared."""

SHARED_MEMORY = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
total = 0
for _ in range(64):
    segment = libc.shmget(0, ctypes.c_size_t(32 << 20), 0o600)
    if segment < 0:
        break
    address = libc.shmat(segment, None, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        break
    ctypes.memset(address, 1, 32 << 20)
    libc.shmdt(ctypes.c_void_p(address))
    total += 32
    print(total, flush=True)
"""


def python(program: str) -> str:
    """A command that runs it."""
    return f"python3 -c {shlex.quote(program)}"


def calls(table: dict[str, tuple[int | str, ...]]) -> str:
    return python(_CALL % table)
