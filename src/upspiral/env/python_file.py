"""An environment of the user's own: a Python file with `make_environment(seed)`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from upspiral.config.models import EnvConfig
from upspiral.env.base import Environment
from upspiral.errors import ConfigError

REQUIRED = ("tools", "task", "demonstrate", "verify")


def load_environment(config: EnvConfig) -> Environment:
    """Imports `env.file` and calls its `make_environment(seed)`. Raises ConfigError that names the file when it cannot
    be imported, has no such function, or returns something that is no Environment."""
    assert config.file is not None, "the config demands env.file for this kind"
    path = Path(config.file)
    spec = importlib.util.spec_from_file_location(f"upspiral_user_environment_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"env.file = {config.file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        environment = module.make_environment(config.seed)
    except Exception as error:  # the boundary to the user's code: whatever it raises is said with the file's name
        raise ConfigError(f"env.file = {config.file} cannot be used: {type(error).__name__}: {error}") from error
    missing = [name for name in REQUIRED if not hasattr(environment, name)]
    if missing:
        raise ConfigError(
            f"env.file = {config.file}: make_environment(seed) gave {environment!r}, which lacks {', '.join(missing)}"
        )
    return environment
