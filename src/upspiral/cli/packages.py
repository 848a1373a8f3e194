"""What a command needs beyond the base install."""

from __future__ import annotations

from importlib.util import find_spec

from upspiral.errors import ModelError

_TRAINING_PACKAGES = ("torch", "transformers", "safetensors")


def need_training_packages(command: str, *others: str) -> None:
    """Raises ModelError that says what to install, when what every training command needs of upspiral[train], or one of
    the `others` in it, is not there."""
    missing = [name for name in (*_TRAINING_PACKAGES, *others) if find_spec(name) is None]
    if missing:
        raise ModelError(f"`upspiral {command}` needs {', '.join(missing)}: pip install 'upspiral[train]'")
