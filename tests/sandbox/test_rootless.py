"""The conformance suite once more, by a user who has no rights at all."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
USER = 100_000 + os.getpid()
"""Nobody has this id."""
TIMEOUT_S = 600.0
BACKENDS = "namespace or process"


@pytest.mark.skipif(os.geteuid() != 0, reason="this run has no rights itself, and takes root to become somebody else")
@pytest.mark.timeout(TIMEOUT_S)
def test_the_suite_passes_as_an_ordinary_user() -> None:
    suite = sorted(map(str, REPOSITORY.glob("tests/sandbox/test_conformance*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", BACKENDS, *suite]
    with tempfile.TemporaryDirectory(prefix="rootless-") as home:
        os.chown(home, USER, USER)
        script = "\n".join([*_open_what_is_closed(Path(home)), _as_user(command)])
        environment = {"PATH": os.environ["PATH"], "HOME": home, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            ["unshare", "--mount", "--propagation=private", "bash", "-euc", script], env=environment, cwd=REPOSITORY,
            capture_output=True, text=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    print(done.stdout[-20_000:], done.stderr[-2000:])
    assert done.returncode == 0
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 150


def _as_user(command: Sequence[str]) -> str:
    return f"exec setpriv --reuid={USER} --regid={USER} --clear-groups -- {shlex.join(command)}"


def _open_what_is_closed(home: Path) -> list[str]:
    """Commands for a mount namespace of its own: folders that others may not pass, as root's home is one, show there
    nothing but what the interpreter and the suite are made of."""
    commands = []
    for number, (folder, needed) in enumerate(_closed_folders().items()):
        aside = home / str(number)
        commands += [
            f"mkdir {aside}",
            f"mount --rbind {shlex.quote(str(folder))} {aside}",
            f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(folder))}",
        ]
        for path in needed:
            there, here = shlex.quote(str(aside / path.relative_to(folder))), shlex.quote(str(path))
            commands.append(f"mkdir -p {here} && mount --rbind {there} {here}")
    return commands


def _closed_folders() -> Mapping[Path, Sequence[Path]]:
    needed = {Path(each) for each in (sys.prefix, sys.base_prefix, REPOSITORY, *sys.path) if Path(each).is_dir()}
    closed: dict[Path, list[Path]] = {}
    for path in sorted(needed):
        barred = [folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001]
        if barred and not any(path.is_relative_to(each) for each in closed.get(barred[0], ())):
            closed.setdefault(barred[0], []).append(path)
    return closed
