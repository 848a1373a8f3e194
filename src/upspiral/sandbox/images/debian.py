"""A small Debian, made by debootstrap."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from upspiral.errors import ImageError

MIRROR = "http://deb.debian.org/debian"
_DEADLINE_S = 1800.0
_INCLUDED = "ca-certificates"
_OF_THIS_MACHINE = ("etc/resolv.conf", "etc/hostname", "var/log/bootstrap.log")
"""debootstrap copies or writes them."""


def bootstrap(release: str, folder: Path, *, mirror: str = MIRROR) -> None:
    """Installs a release such as "bookworm" into an empty folder. Raises ImageError that says what to do.

    debootstrap mounts /proc in the folder and runs programs there, so it gets namespaces of its own: whatever ends it,
    or this process, ends those and unmounts it, before anybody removes the folder.
    """
    program, unshare, setpriv = map(shutil.which, ("debootstrap", "unshare", "setpriv"))
    if program is None or unshare is None or setpriv is None:
        raise ImageError(
            f"debian:{release} needs debootstrap, unshare and setpriv; on Debian: apt-get install debootstrap"
        )
    if os.geteuid() != 0:
        raise ImageError(
            f"debian:{release} needs root, as debootstrap does; without it, take an archive that was made elsewhere "
            "(tar:FILE or oci:FILE) or an image of docker (docker:NAME)"
        )
    apart = [unshare, "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    bootstrapping = [program, "--variant=minbase", f"--include={_INCLUDED}", release, str(folder), mirror]
    said, exit_code = _run([setpriv, "--pdeathsig", "KILL", *apart, *bootstrapping])
    if exit_code != 0:
        raise ImageError(f"debootstrap could not make debian:{release} (exit code {exit_code}): {said}")
    for place in _OF_THIS_MACHINE:
        (folder / place).unlink(missing_ok=True)
    for place in ("var/lib/apt/lists", "var/cache/apt/archives", "var/cache/apt/archives/partial"):
        for path in (folder / place).iterdir():
            if not path.is_dir():
                path.unlink()


def _run(command: list[str]) -> tuple[str, int]:
    """What it said last, and its exit code."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=_DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"it took over {_DEADLINE_S:.0f} s", -signal.SIGKILL
    return " | ".join(output.strip().splitlines()[-5:])[-800:], process.returncode
