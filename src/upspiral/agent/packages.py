"""The packages of the agents that we start: which ones, in which versions, and where they are kept.

An agent's packages never meet ours: those from npm lie in a folder of their own, those from PyPI in a virtual
environment of their own. The versions stand in packages.toml, nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from upspiral.agent.launchers.registry import launcher_of
from upspiral.errors import AgentError
from upspiral.weights.models import cache_folder

INSTALL_DEADLINE_S = 1800.0
MANIFEST = "upspiral-agent.json"
_NPM_CPUS = {"x86_64": "x64", "aarch64": "arm64"}
_READABLE_UMASK = 0o022
"""The sandbox's user is another one than this process's and has to read the files."""


@dataclass(frozen=True, slots=True)
class AgentPackages:
    """What one agent is made of, as packages.toml has it."""

    name: str
    version: str
    about: str
    npm: tuple[str, ...] = ()
    """Exact npm packages. `{cpu}` stands for this machine's processor in npm's words."""
    pypi: tuple[str, ...] = ()
    """Exact requirements, complete: what they depend on is among them."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.npm, self.pypi)).encode()).hexdigest()[:16]


@cache
def agent_packages(name: str) -> AgentPackages:
    """Raises AgentError naming the nearest agent when there is none of that name."""
    launcher_of(name)
    table: dict[str, Any] = tomllib.loads(
        resources.files("upspiral.agent.launchers").joinpath("packages.toml").read_text("utf-8")
    )[name]
    fields: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in table.items()}
    return AgentPackages(name, **fields)


def agents_folder() -> Path:
    """Where agents are kept: beside the models, below UPSPIRAL_CACHE or ~/.cache/upspiral."""
    return cache_folder().parent / "agents"


def cached_agent(name: str) -> Path | None:
    """The folder of an agent in the versions that this upspiral wants, when it was fetched."""
    packages = agent_packages(name)
    folder = agents_folder() / f"{name}-{packages.version}"
    try:
        digest = json.loads((folder / MANIFEST).read_text())["digest"]
    except (OSError, ValueError, KeyError):
        return None
    return folder if digest == packages.digest else None


def require_agent(name: str) -> Path:
    """The folder of an agent. Raises AgentError that says how to fetch it when it is not in the cache."""
    if (folder := cached_agent(name)) is not None:
        return folder
    version = agent_packages(name).version
    raise AgentError(f"{name} {version} is not in {agents_folder()}; fetch it with `upspiral agent get {name}`")


def get_agent(name: str, *, progress: Callable[[str], None] = print) -> Path:
    """Fetches an agent into the cache, once, and returns its folder. `progress` gets lines for people.

    Raises AgentError when the name is unknown, npm or pip is missing or the installation fails.
    """
    packages = agent_packages(name)
    if (folder := cached_agent(name)) is not None:
        progress(f"{name} {packages.version} is already in {folder}")
        return folder
    target = agents_folder() / f"{name}-{packages.version}"
    target.parent.mkdir(parents=True, exist_ok=True)
    progress(f"installing {name} {packages.version} with {'npm' if packages.npm else 'pip'}")
    started = time.monotonic()
    # The work happens beside the target, so that the last move is a rename and no half agent is ever seen.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as work:
        made = Path(work) / "agent"
        install = _install_from_npm if packages.npm else _install_from_pypi
        install(packages, made, Path(work))
        manifest = {"name": name, "version": packages.version, "digest": packages.digest}
        (made / MANIFEST).write_text(json.dumps(manifest) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    progress(f"installed in {time.monotonic() - started:.0f} s; {name} is in {target}")
    return target


def _install_from_npm(packages: AgentPackages, made: Path, work: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise AgentError(f"{packages.name} comes from npm, and npm is missing; install Node.js (nodejs.org) first")
    cpu = _NPM_CPUS.get(platform.machine())
    if cpu is None or sys.platform != "linux":
        raise AgentError(
            f"{packages.name} has no binary for {sys.platform} on {platform.machine()}; it runs on Linux on "
            + " and ".join(_NPM_CPUS)
        )
    made.mkdir(mode=0o755)
    (made / "package.json").write_text("{}")
    # The binaries of this platform are named in packages.toml: optional dependencies would bring all variants along.
    # Scripts of packages stay off: they would download more, and nothing that is pinned needs them.
    options = ["--omit=optional", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund"]
    options += ["--prefix", str(made), "--cache", str(work / "cache"), "--loglevel", "error"]
    _run([npm, "install", *options, *(each.format(cpu=cpu) for each in packages.npm)], f"npm install {packages.name}")


def _install_from_pypi(packages: AgentPackages, made: Path, work: Path) -> None:
    del work
    venv = [sys.executable, "-m", "venv", "--without-pip", str(made)]
    _run(venv, f"making a virtual environment for {packages.name}")
    pip = [sys.executable, "-m", "pip", "--python", str(made / "bin" / "python"), "--disable-pip-version-check"]
    options = ["--quiet", "--no-cache-dir", "--no-deps", "--only-binary", ":all:"]
    _run([*pip, "install", *options, *packages.pypi], f"pip install {packages.name}")


def _run(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=INSTALL_DEADLINE_S, check=False, umask=_READABLE_UMASK, env={**os.environ, "NO_COLOR": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise AgentError(f"{what} took over {INSTALL_DEADLINE_S:.0f} s; check the network") from None
    if "No module named pip" in done.stdout:
        raise AgentError(f"{sys.executable} has no pip; install it with `{sys.executable} -m ensurepip`")
    if done.returncode != 0:
        said = " | ".join(done.stdout.strip().splitlines()[-5:])[-600:] or "no message"
        raise AgentError(f"{what} failed with exit code {done.returncode}: {said}; check the network and the registry")
