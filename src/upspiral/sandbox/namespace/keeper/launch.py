"""From a fresh child of the keeper to PID 1 of a sandbox."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NoReturn

from upspiral.sandbox.inside.agent import serve
from upspiral.sandbox.inside.settings import Settings
from upspiral.sandbox.namespace.keeper import syscalls
from upspiral.sandbox.namespace.keeper.control_groups import Group
from upspiral.sandbox.namespace.keeper.live import LAST_WORDS, LAST_WORDS_BYTES
from upspiral.sandbox.namespace.keeper.order import Order
from upspiral.sandbox.namespace.keeper.skeleton import WRITABLE
from upspiral.sandbox.namespace.keeper.stack import Stack
from upspiral.sandbox.namespace.keeper.syscalls import MountFlag, Namespace

CLONED = Namespace.USER | Namespace.PID
"""The keeper's child begins in these; it makes the others, which take longer, while the keeper goes on."""
GO, READY = b"go", b"ready"
_UNSHARED = Namespace.MOUNT | Namespace.NETWORK | Namespace.IPC | Namespace.UTS | Namespace.CGROUP
_OWN_INODES = 32
"""Files that a sandbox is made of; its user does not have to pay for them."""
_MIN_DISK_BYTES = 1 << 20
_SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8914, 0x41
_HARMLESS = MountFlag.NOSUID | MountFlag.NODEV


@dataclass(frozen=True, slots=True)
class Ground:
    """What a sandbox stands on."""

    lower: Sequence[str]
    """Folders of layers that the keeper has mounted, top first, relative to its working directory."""
    used_bytes: int
    used_inodes: int
    """Of the disk, by these layers."""
    image: int
    """How many trees of image layers come below these."""
    programs: Sequence[str] | None
    """Folders of this machine's programs, for sandboxes that have no image."""
    filter: bytes
    """Of system calls; empty for none."""

    @classmethod
    def on(cls, stack: Stack, programs: Sequence[str] | None, filter_program: bytes) -> Ground:
        used_bytes, used_inodes = (
            sum(getattr(layer, name) for layer in stack.layers) for name in ("num_bytes", "num_inodes")
        )
        return cls(
            [layer.folder for layer in stack.layers],
            used_bytes,
            used_inodes,
            len(stack.image),
            programs,
            filter_program,
        )


def run_sandbox(order: Order, ground: Ground, line: socket.socket, agent: int, group: Group | None) -> NoReturn:
    """Enters the group, becomes PID 1 of the sandbox, and serves to the end.

    The keeper's go-ahead comes by `line`, once it has mapped the ids, with trees of mounts for the image's layers and
    for `order.mounts`, and a file that counts out-of-memory kills if there is a control group. Back goes a tree of the
    sandbox's own disk, or what failed. What fails later is written to a file on that disk: neither side has to keep the
    line.
    """
    try:
        if group is not None:
            group.enter()
        settings = _become_sandbox(order, ground, line, agent)
        serve(socket.socket(fileno=agent), settings)
        os._exit(0)
    except BaseException as error:
        with suppress(OSError):
            os.write(line.fileno(), _described(error).encode(errors="replace")[:LAST_WORDS_BYTES])
    finally:
        os._exit(1)


def _described(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace is not None else ""
    return f"{error} ({type(error).__name__} in {where})"


def _become_sandbox(order: Order, ground: Ground, line: socket.socket, agent: int) -> Settings:
    _forget_the_keeper(line, agent)
    message, given, _, _ = socket.recv_fds(line, 64, 253)
    if message != GO:
        raise EOFError("the keeper has gone")
    trees, rest = given[: ground.image + len(order.mounts)], given[ground.image + len(order.mounts) :]
    os.setresgid(order.user, order.user, order.user)
    os.setresuid(order.user, order.user, order.user)
    syscalls.die_with_parent(signal.SIGKILL)
    syscalls.unshare(_UNSHARED)
    disk = _make_root(order, ground, trees)
    _raise_loopback()
    _set("net/ipv4/ip_unprivileged_port_start", 0)
    _set("user/max_user_namespaces", 0)  # below this one
    syscalls.set_hostname("sandbox")
    proc = _cover_proc()
    _drop_privileges(ground.filter)
    words = os.open(LAST_WORDS, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=disk)
    socket.send_fds(line, [READY], [disk])
    os.dup2(words, line.fileno(), inheritable=False)
    for descriptor in (words, disk):
        os.close(descriptor)
    for descriptor in rest:
        os.set_inheritable(descriptor, False)
    return Settings.from_json({**order.agent, "oom_fd": rest[0] if rest else None, "proc_fd": proc})


def _forget_the_keeper(line: socket.socket, agent: int) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(0, 1)
    os.dup2(0, 2)
    syscalls.close_from(3, {line.fileno(), agent})


def _make_root(order: Order, ground: Ground, trees: Sequence[int]) -> int:
    """The sandbox's file system, and this process in it. Returns the tree of its disk.

    Below t/, a tmpfs: u (upper) and w (work) of the overlay, m (where it is mounted), s (/dev/shm), 0, 1, ... (image).
    """
    size = max(order.disk_bytes - ground.used_bytes, _MIN_DISK_BYTES)
    inodes = max(order.inodes - ground.used_inodes, 0) + _OWN_INODES
    options = f"size={size},nr_inodes={inodes},mode=755"
    syscalls.mount("tmpfs", "t", "tmpfs", _HARMLESS, options)
    disk = syscalls.clone_tree("t")
    for name, mode in (("u", 0o755), ("w", 0o700), ("m", 0o755), ("s", 0o1777)):
        os.mkdir(f"t/{name}")
        os.chmod(f"t/{name}", mode)
    image, mounted = trees[: ground.image], trees[ground.image :]
    for number, tree in enumerate(image):
        os.mkdir(f"t/{number}")
        syscalls.attach(tree, f"t/{number}")
    below = [*ground.lower, *(f"t/{number}" for number in range(len(image)))]
    if ground.programs is not None:
        below.append("skeleton")
        if not ground.lower:
            _furnish()
        os.chmod("t/u", 0o555)
    options = f"lowerdir={':'.join(below)},upperdir=t/u,workdir=t/w,userxattr"
    syscalls.mount("overlay", "t/m", "overlay", _HARMLESS, options)
    programs = [(f"/{name}", syscalls.clone_tree(f"programs/{name}")) for name in ground.programs or ()]
    dev, shared_memory = syscalls.clone_tree("dev"), syscalls.clone_tree("t/s")
    os.chdir("t/m")
    syscalls.pivot_root()
    # From here on no path can lead out, whatever links the image has. A new /proc can be mounted only while the old
    # one is in sight.
    os.makedirs("/proc", exist_ok=True)
    syscalls.mount("proc", "/proc", "proc", _HARMLESS | MountFlag.NOEXEC)
    syscalls.drop_old_root()
    for path, tree in (*programs, ("/dev", dev), *zip(order.mounts, mounted, strict=True)):
        try:
            _mount_at(path, tree)
        except OSError:
            if not ground.lower:
                raise
            _make_way(path, tree)
            _mount_at(path, tree)
        os.close(tree)
    syscalls.attach(shared_memory, "/dev/shm")
    os.close(shared_memory)
    syscalls.mount("devpts", "/dev/pts", "devpts", MountFlag.NOSUID | MountFlag.NOEXEC, "newinstance,ptmxmode=0666")
    for name, mode in WRITABLE.items():
        try:
            if not os.path.isdir(f"/{name}"):
                os.makedirs(f"/{name}")
                os.chmod(f"/{name}", mode)
        except OSError:
            if not ground.lower:
                raise
            # Somebody in the sandbox put a file or a link there. That must not pass for a failure of ours.
    return disk


def _furnish() -> None:
    """The skeleton belongs to nobody inside, so the folders that the user may write in are made above it."""
    os.mkdir("t/u/var", 0o755)
    for name, mode in WRITABLE.items():
        os.mkdir(f"t/u/{name}")
        os.chmod(f"t/u/{name}", mode)
    os.chmod("t/u/var", 0o555)


def _make_way(path: str, tree: int) -> None:
    """Takes away the files and links that somebody in the sandbox left there, on which nothing can be mounted. What
    follows on its snapshots could not begin, which would pass for a failure of ours."""
    folders = [*map(str, reversed(PurePosixPath(path).parents)), *([path] if _is_folder(tree) else ())]
    for folder in folders:
        if os.path.islink(folder) or (os.path.exists(folder) and not os.path.isdir(folder)):
            os.unlink(folder)
    if os.path.islink(path):
        os.unlink(path)


def _is_folder(tree: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{tree}")


def _mount_at(path: str, tree: int) -> None:
    if not os.path.exists(path):
        if _is_folder(tree):
            os.makedirs(path)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    syscalls.attach(tree, path)


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP_RUNNING))


def _set(name: str, value: int) -> None:
    """A setting of the kernel's for the namespaces of this process."""
    with open(f"/proc/sys/{name}", "w") as file:
        file.write(str(value))


def _cover_proc() -> int:
    """From here on /proc cannot be written by its path. Returns the one below, which can."""
    below = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    tree = syscalls.clone_tree("/proc")
    syscalls.protect(tree)
    syscalls.attach(tree, "/proc")
    os.close(tree)
    return below


def _drop_privileges(filter_program: bytes) -> None:
    # Not 0: where cores go to a program of the host, the kernel heeds no limit but this one, which means "none".
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != 0:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    syscalls.forbid_new_privileges()
    syscalls.drop_capabilities()
    syscalls.forbid_inspection()
    if filter_program:
        syscalls.filter_system_calls(filter_program)
