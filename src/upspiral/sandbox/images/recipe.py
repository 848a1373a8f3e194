"""How an image is made, as a TOML file."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from upspiral.errors import ConfigError
from upspiral.sandbox.base import WORKSPACE
from upspiral.sandbox.egress.policy import parse_rule

MIRRORS = ("deb.debian.org", "security.debian.org", "pypi.org", "files.pythonhosted.org", "registry.npmjs.org")
"""What steps may reach without being told: the package registries."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _packages(packages: tuple[str, ...]) -> tuple[str, ...]:
    for package in packages:
        if not re.fullmatch(r"[^-\s]\S*", package):
            raise ValueError(f"{package!r} is no package")
    return packages


def _absolute(path: str) -> str:
    if not path.startswith("/") or ".." in path.split("/") or path.strip("/") == "":
        raise ValueError(f"{path!r} is no absolute path of a file or folder inside")
    return path


def _variables(env: Mapping[str, str]) -> Mapping[str, str]:
    for name, value in env.items():
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise ValueError(f"{name!r} is no name of a variable, or its value no text")
    return env


def _hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    for host in hosts:
        parse_rule(host)
    return hosts


Packages = Annotated[tuple[str, ...], AfterValidator(_packages)]
Inside = Annotated[str, AfterValidator(_absolute)]


class Recipe(BaseModel):
    """The keys of a recipe. Steps are done in the order apt, pip, npm, files, commands."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    """What sandboxes call the image."""
    base: str
    """What it is made on: "debian:bookworm", "docker:NAME", "oci:PATH" (an archive of `docker save` or an OCI layout),
    "tar:PATH", "folder:PATH", or the name of another image of the store. Paths are relative to the recipe."""
    apt: Packages = ()
    """Packages of Debian."""
    pip: Packages = ()
    """Requirements of Python, for the image's own python3."""
    npm: Packages = ()
    """Packages of npm, installed globally."""
    files: Mapping[Inside, str] = {}
    """Absolute path inside -> a file or folder, relative to the recipe. They belong to root inside."""
    env: Annotated[Mapping[str, str], AfterValidator(_variables)] = {}
    """Variables of every command in the image, and of the steps."""
    workdir: Inside = WORKSPACE
    """Where commands start."""
    commands: tuple[str, ...] = ()
    """Bash command lines, each a step."""
    hosts: Annotated[tuple[str, ...], AfterValidator(_hosts)] = ()
    """What the steps may reach beside the package registries, as in an egress allow-list."""
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1800.0
    """Of one step."""
    memory_mb: Annotated[int, Field(ge=64)] = 4096
    """Of one step, what it writes included."""
    disk_mb: Annotated[int, Field(ge=1)] = 3072
    """What one step may write."""


@dataclass(frozen=True, slots=True)
class Step:
    """Something that is run in a sandbox of the image so far; what it writes is the next layer."""

    name: str
    """For people and error messages: the key, with a number for commands."""
    script: str


def load_recipe(path: Path) -> Recipe:
    """Raises ConfigError that names the file and every key that is wrong."""
    try:
        given = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}; recipes/images/ has some to start from") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_problems(error, given))) from None


def _problems(error: ValidationError, given: Mapping[str, object]) -> Iterator[str]:
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"] if part != "[key]")
        if detail["type"] == "extra_forbidden":
            near = get_close_matches(key, Recipe.model_fields, n=1)
            yield f"there is no key {key}" + (f"; did you mean {near[0]}?" if near else f"; there are {_keys()}")
        elif detail["type"] == "missing":
            yield f"the key {key} is missing"
        else:
            shown = json.dumps(detail["input"], default=str)[:80]
            yield f"{key} = {shown}: {detail['msg'].removeprefix('Value error, ')}"


def _keys() -> str:
    return ", ".join(Recipe.model_fields)


def steps_before_files(recipe: Recipe) -> Iterator[Step]:
    """Those that install packages. Caches of the installers are not left in the layers."""
    if recipe.apt:
        # Its downloads would run as another user, which a sandbox may not have.
        apt_get = "apt-get -o APT::Sandbox::User=root -o Dpkg::Use-Pty=0"
        yield Step(
            "apt",
            f"set -e; export DEBIAN_FRONTEND=noninteractive; {apt_get} update -qq; "
            f"{apt_get} install -qq -y --no-install-recommends {shlex.join(recipe.apt)}; "
            "rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb",
        )
    if recipe.pip:
        yield Step(
            "pip",
            "PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 "
            f"python3 -m pip install --quiet --no-cache-dir {shlex.join(recipe.pip)}",
        )
    if recipe.npm:
        yield Step("npm", f"npm install --global --no-audit --no-fund --cache /tmp/npm {shlex.join(recipe.npm)}")


def steps_after_files(recipe: Recipe) -> Iterator[Step]:
    """The recipe's own commands."""
    for number, command in enumerate(recipe.commands):
        yield Step(f"commands.{number}", command)
