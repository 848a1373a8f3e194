"""Which environments there are, by the name in the run file."""

from __future__ import annotations

from collections.abc import Callable

from upspiral.config.models import EnvConfig
from upspiral.env.base import Environment
from upspiral.env.python_file import load_environment
from upspiral.env.shell.environment import ShellEnvironment

ENVIRONMENTS: dict[str, Callable[[EnvConfig], Environment]] = {
    "shell": ShellEnvironment,
    "python": load_environment,
}


def make_environment(config: EnvConfig) -> Environment:
    """The environment of a run. Raises ConfigError for options that it does not have."""
    return ENVIRONMENTS[config.kind](config)
