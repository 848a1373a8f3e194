"""Whether this machine can make sandboxes of namespaces, and what to do where it cannot."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from upspiral.errors import SandboxError

_OLDEST_KERNEL = (5, 14)
"""From here on a limit on processes counts within one user namespace; everything else that is needed is older."""
_SYSCTLS = {
    "kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "AppArmor takes the rights in user namespaces away, as on Ubuntu 24.04: "
        "`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`",
    ),
    "kernel/unprivileged_userns_clone": ("0", "`sudo sysctl kernel.unprivileged_userns_clone=1`"),
    "user/max_user_namespaces": ("0", "`sudo sysctl user.max_user_namespaces=10000`"),
}


def check_host() -> None:
    """Raises SandboxError for what can be told without trying."""
    if sys.platform != "linux":
        raise SandboxError(f"the namespace sandbox needs Linux, and this is {sys.platform}")
    kernel = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    if kernel < _OLDEST_KERNEL:
        raise SandboxError(f"the namespace sandbox needs Linux 5.14 or newer, and this is {platform.release()}")
    if not any(os.access(f"{folder}/bash", os.X_OK) for folder in ("/usr/bin", "/bin")):
        raise SandboxError("the namespace sandbox needs bash in /usr/bin or /bin; install the system package bash")


def explain(problem: str) -> str:
    """What failed when a sandbox was tried, and what may help."""
    remedies = [remedy for name, (hindrance, remedy) in _SYSCTLS.items() if _read(name) == hindrance]
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        remedies.append("this is a container: start it with permission to mount, as `docker run --privileged` does")
    if os.geteuid() != 0:
        remedies.append("or run as root, which needs none of this")
    advice = "; ".join(remedies) or "is this a container without permission to mount (`docker run --privileged`)?"
    return f"sandboxes cannot be made of namespaces here: {problem}. What may help: {advice}"


def _read(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""
