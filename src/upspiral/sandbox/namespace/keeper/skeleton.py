"""What sandboxes on the machine's own programs have in common, made once, below the keeper's working directory.

skeleton/   the bottom layer: folders to mount on, a small /etc
programs/   the machine's /usr, /bin, ... read-only
dev/        a /dev with the devices that are no danger, read-only
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from upspiral.sandbox.namespace.keeper import syscalls
from upspiral.sandbox.namespace.keeper.order import AGENT_ID
from upspiral.sandbox.namespace.keeper.syscalls import MountFlag

_SYSTEM_FOLDERS = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC_FILES = ("ld.so.cache", "ld.so.conf", "localtime", "mime.types", "magic", "protocols", "services")
_ETC_FOLDERS = ("alternatives", "ld.so.conf.d")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
WRITABLE = {"work": 0o755, "tmp": 0o1777, "var/tmp": 0o1777}
"""Folders in which the user of a sandbox on the machine's own programs may write, and their modes."""
MADE = ("/dev", "/proc", *(f"/{name}" for name in WRITABLE))
"""Folders that every sandbox has, whatever its image."""


def make_skeleton() -> Sequence[str]:
    """Returns the names of the folders below programs/ that are to be mounted."""
    mounted = []
    for name in ("skeleton", "programs", *(f"skeleton/{each}" for each in ("dev", "proc", "run", "var"))):
        os.mkdir(name, 0o755)
    for name, mode in WRITABLE.items():
        os.mkdir(f"skeleton/{name}")
        os.chmod(f"skeleton/{name}", mode)
    for name in _SYSTEM_FOLDERS:
        path = Path("/", name)
        if path.is_symlink():
            os.symlink(os.readlink(path), f"skeleton/{name}")
        elif path.is_dir():
            os.mkdir(f"skeleton/{name}", 0o755)
            os.mkdir(f"programs/{name}", 0o755)
            _mount_read_only(str(path), f"programs/{name}")
            mounted.append(name)
    _make_etc(Path("skeleton/etc"))
    # Where the keeper is not root the skeleton belongs to the sandbox's user, who should not write to it by mistake.
    for folder, _, files in os.walk("skeleton"):
        for path in (Path(folder, each) for each in ("", *files)):
            if not path.is_symlink() and str(path).removeprefix("skeleton/") not in WRITABLE:
                path.chmod(path.stat().st_mode & ~0o222)
    return mounted


def _mount_read_only(source: str, target: str) -> None:
    tree = syscalls.clone_tree(source)
    syscalls.protect(tree)
    syscalls.attach(tree, target)
    os.close(tree)


def _make_etc(folder: Path) -> None:
    """What programs need to start, and nothing about this machine or its users."""
    folder.mkdir(0o755)
    for name in _ETC_FILES:
        if Path("/etc", name).is_file():
            shutil.copyfile(Path("/etc", name), folder / name)
    for name in _ETC_FOLDERS:
        if Path("/etc", name).is_dir():
            shutil.copytree(Path("/etc", name), folder / name, symlinks=True)
    (folder / "hosts").write_text("127.0.0.1 localhost sandbox\n::1 localhost\n")
    (folder / "passwd").write_text(
        f"root:x:0:0:root:/:/bin/bash\nagent:x:{AGENT_ID}:{AGENT_ID}:agent:/work:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/:/bin/false\n"
    )
    (folder / "group").write_text(f"root:x:0:\nagent:x:{AGENT_ID}:\nnogroup:x:65534:\n")


def make_dev() -> None:
    os.mkdir("dev", 0o755)
    syscalls.mount("tmpfs", "dev", "tmpfs", MountFlag.NOSUID | MountFlag.NOEXEC, "size=64k,mode=755")
    for name in _DEVICES:
        os.close(os.open(f"dev/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
        syscalls.bind(f"/dev/{name}", f"dev/{name}")
    for name, target in _DEVICE_LINKS.items():
        os.symlink(target, f"dev/{name}")
    os.mkdir("dev/pts", 0o755)
    os.mkdir("dev/shm", 0o755)
    read_only = MountFlag.REMOUNT | MountFlag.BIND | MountFlag.READ_ONLY | MountFlag.NOSUID | MountFlag.NOEXEC
    syscalls.mount("tmpfs", "dev", "", read_only)
