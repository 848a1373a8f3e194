"""From a fresh child of the keeper to PID 1 of a sandbox."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import NoReturn

from upspiral.sandbox.inside.agent import serve
from upspiral.sandbox.inside.settings import Settings
from upspiral.sandbox.namespace.keeper import syscalls
from upspiral.sandbox.namespace.keeper.control_groups import Group
from upspiral.sandbox.namespace.keeper.live import LAST_WORDS, LAST_WORDS_BYTES
from upspiral.sandbox.namespace.keeper.order import Order
from upspiral.sandbox.namespace.keeper.rehearsal import rehearse
from upspiral.sandbox.namespace.keeper.skeleton import WRITABLE
from upspiral.sandbox.namespace.keeper.stack import Stack
from upspiral.sandbox.namespace.keeper.syscalls import Filter, MountFlag, Namespace
from upspiral.sandbox.namespace.seccomp import filter_program

GO, READY = b"go", b"ready"
_UNSHARED = Namespace.MOUNT | Namespace.NETWORK | Namespace.IPC | Namespace.UTS | Namespace.CGROUP
_OWN_INODES = 32
"""Files that a sandbox is made of; its user does not have to pay for them."""
_MIN_DISK_BYTES = 1 << 20
_SIOCSIFFLAGS, _LOOPBACK_UP = 0x8914, struct.pack("16sh14x", b"lo", 0x41)
_HARMLESS, _FOR_PROC = MountFlag.NOSUID | MountFlag.NODEV, MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
_FOR_TERMINALS = MountFlag.NOSUID | MountFlag.NOEXEC


@dataclass(slots=True)
class Plan:
    """What a child becomes; it travels as JSON. (Not frozen, which would cost every child memory.)"""

    entrances: Sequence[str]
    """Of the control group that the child is to enter, if any."""
    user: int
    lower: Sequence[str]
    """Folders of layers that the keeper has mounted, top first, relative to its working directory."""
    image: int
    """How many trees of image layers come below these. 0: this machine's programs are mounted instead."""
    disk_bytes: int
    inodes: int
    """What is left of them above the layers."""
    mounts: Sequence[str]
    """Where the trees that follow those of the image go."""
    agent: Mapping[str, object]

    @classmethod
    def of(cls, order: Order, stack: Stack, group: Group | None) -> Plan:
        return cls(
            entrances=() if group is None else group.entrances,
            user=order.user,
            lower=[layer.folder for layer in stack.layers],
            image=len(stack.image),
            disk_bytes=max(order.disk_bytes - sum(layer.num_bytes for layer in stack.layers), _MIN_DISK_BYTES),
            inodes=max(order.inodes - sum(layer.num_inodes for layer in stack.layers), 0) + _OWN_INODES,
            mounts=list(order.mounts),
            agent=order.agent,
        )

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Plan:
        return cls(**json.loads(content))


@dataclass(frozen=True, slots=True)
class Sandboxing:
    """The part of a mould's children (`Part`); what is the same for all of them."""

    programs: Sequence[str]
    """Folders of this machine's programs, for sandboxes that have no image."""
    filter: Filter | None
    filter_for_images: Filter | None

    @classmethod
    def of_this_machine(cls, programs: Sequence[str]) -> Sandboxing:
        plain, for_images = filter_program(), filter_program(pretends_to_give_away=True)
        return cls(programs, Filter(plain) if plain else None, Filter(for_images) if for_images else None)

    def play(self, asked: bytes, descriptors: Sequence[int]) -> NoReturn:
        """Enters its control group, becomes PID 1 of the sandbox, and serves to the end. `descriptors`: a line to the
        keeper, and the agent's socket.

        The keeper's go-ahead comes by the line, once it has mapped the ids, with trees of mounts for the image's layers
        and for the mounts, and a file that counts out-of-memory kills if there is a control group. Back goes a tree of
        the sandbox's own disk, or what failed. What fails later is written to a file on that disk: neither side has to
        keep the line.
        """
        line, agent = descriptors[:2]
        try:
            plan = Plan.from_json(asked)
            for entrance in plan.entrances:
                _write(entrance, b"0")
            settings = _become_sandbox(plan, self, line, agent)
            serve(socket.socket(fileno=agent), settings)
            os._exit(0)
        except BaseException as error:
            with suppress(OSError):
                os.write(line, _reason(error).encode(errors="replace")[:LAST_WORDS_BYTES])
        finally:
            os._exit(1)

    def rehearse(self, asked: bytes) -> None:
        rehearse(Settings.from_json({**Plan.from_json(asked).agent, "oom_fd": None, "proc_fd": None}))


def _reason(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace is not None else ""
    return f"{error} ({type(error).__name__} in {where})"


def _become_sandbox(plan: Plan, equipment: Sandboxing, line_fd: int, agent: int) -> Settings:
    _forget_the_keeper(line_fd, agent)
    line = socket.socket(fileno=line_fd)
    message, given, _, _ = socket.recv_fds(line, 64, 253)
    if message != GO:
        raise EOFError("the keeper has gone")
    trees, rest = given[: plan.image + len(plan.mounts)], given[plan.image + len(plan.mounts) :]
    os.setresgid(plan.user, plan.user, plan.user)
    os.setresuid(plan.user, plan.user, plan.user)
    syscalls.die_with_parent(signal.SIGKILL)
    syscalls.unshare(_UNSHARED)
    disk = _make_root(plan, trees, () if plan.image else equipment.programs)
    _raise_loopback()
    # Settings of the kernel's for the namespaces of this process:
    _write("/proc/sys/net/ipv4/ip_unprivileged_port_start", b"0")
    _write("/proc/sys/user/max_user_namespaces", b"0")  # below this one
    syscalls.set_hostname("sandbox")
    proc = _cover_proc()
    _drop_privileges(equipment.filter_for_images if plan.image else equipment.filter)
    words = os.open(LAST_WORDS, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=disk)
    socket.send_fds(line, [READY], [disk])
    os.dup2(words, line.detach(), inheritable=False)
    for descriptor in (words, disk):
        os.close(descriptor)
    for descriptor in rest:
        os.set_inheritable(descriptor, False)
    return Settings.from_json({**plan.agent, "oom_fd": rest[0] if rest else None, "proc_fd": proc})


def _forget_the_keeper(line: int, agent: int) -> None:
    os.dup2(0, 1)
    os.dup2(0, 2)
    syscalls.close_from(3, {line, agent})


def _make_root(plan: Plan, trees: Sequence[int], programs: Sequence[str]) -> int:
    """The sandbox's file system, and this process in it. Returns the tree of its disk.

    Below t/, a tmpfs: u (upper) and w (work) of the overlay, m (where it is mounted), s (/dev/shm), 0, 1, ... (image).
    """
    options = f"size={plan.disk_bytes},nr_inodes={plan.inodes},mode=755"
    syscalls.mount("tmpfs", "t", "tmpfs", _HARMLESS, options)
    disk = syscalls.clone_tree("t")
    for name, mode in (("u", 0o755), ("w", 0o700), ("m", 0o755), ("s", 0o1777)):
        os.mkdir(f"t/{name}")
        os.chmod(f"t/{name}", mode)
    image, mounted = trees[: plan.image], trees[plan.image :]
    for number, tree in enumerate(image):
        os.mkdir(f"t/{number}")
        syscalls.attach(tree, f"t/{number}")
    below = [*plan.lower, *(f"t/{number}" for number in range(len(image)))]
    if not image:
        below.append("skeleton")
        if not plan.lower:
            _furnish()
        os.chmod("t/u", 0o555)
    options = f"lowerdir={':'.join(below)},upperdir=t/u,workdir=t/w,userxattr"
    syscalls.mount("overlay", "t/m", "overlay", _HARMLESS, options)
    mounts = [(f"/{name}", syscalls.clone_tree(f"programs/{name}")) for name in programs]
    dev, shared_memory = syscalls.clone_tree("dev"), syscalls.clone_tree("t/s")
    os.chdir("t/m")
    syscalls.pivot_root()
    # From here on no path can lead out, whatever links the image has. A new /proc can be mounted only while the old
    # one is in sight.
    if not os.path.exists("/proc"):
        os.mkdir("/proc")
    syscalls.mount("proc", "/proc", "proc", _FOR_PROC)
    syscalls.drop_old_root()
    for path, tree in (*mounts, ("/dev", dev), *zip(plan.mounts, mounted, strict=True)):
        try:
            _mount_at(path, tree)
        except OSError:
            if not plan.lower:
                raise
            _make_way(path, tree)
            _mount_at(path, tree)
        os.close(tree)
    syscalls.attach(shared_memory, "/dev/shm")
    os.close(shared_memory)
    syscalls.mount("devpts", "/dev/pts", "devpts", _FOR_TERMINALS, "newinstance,ptmxmode=0666")
    for name, mode in WRITABLE.items():
        try:
            if not os.path.isdir(f"/{name}"):
                os.makedirs(f"/{name}")
                os.chmod(f"/{name}", mode)
        except OSError:
            if not plan.lower:
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
    any_socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _LOOPBACK_UP)
    any_socket.close()


def _write(path: str, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY)
    os.write(file, content)
    os.close(file)


def _cover_proc() -> int:
    """From here on /proc cannot be written by its path. Returns the one below, which can."""
    below = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    tree = syscalls.clone_tree("/proc")
    syscalls.protect(tree)
    syscalls.attach(tree, "/proc")
    os.close(tree)
    return below


def _drop_privileges(call_filter: Filter | None) -> None:
    # Not 0: where cores go to a program of the host, the kernel heeds no limit but this one, which means "none".
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != 0:
        resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    syscalls.forbid_new_privileges()
    syscalls.drop_capabilities()
    syscalls.forbid_inspection()
    if call_filter is not None:
        call_filter.install()
