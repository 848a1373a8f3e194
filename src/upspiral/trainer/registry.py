"""The trainer backends of several ranks, by `trainer.kind`. What a kind needs is imported when it is made."""

from __future__ import annotations

from importlib import import_module

from upspiral.errors import ConfigError
from upspiral.trainer.base import TrainerBackend, TrainerSetup

_BACKENDS = {
    "fsdp": "upspiral.trainer.fsdp.backend:FsdpBackend",
    "deepspeed": "upspiral.trainer.deepspeed.backend:DeepSpeedBackend",
    "megatron": "upspiral.trainer.megatron.backend:MegatronBackend",
}
"""Each is called with a TrainerSetup on every rank, inside the process group of all ranks, which outlives it."""
RESHARDING = ("fsdp", "megatron")
"""Those that `load` what other numbers of ranks have written, however they divided the model."""


def make_backend(kind: str, setup: TrainerSetup) -> TrainerBackend:
    """One rank's part of a backend. `kind`: a name from above, or MODULE:CLASS of one's own. Raises ConfigError when
    the packages of the kind are not installed."""
    module, _, name = _BACKENDS.get(kind, kind).partition(":")
    try:
        backend = getattr(import_module(module), name)
    except ImportError as error:
        raise ConfigError(
            f'trainer.kind = "{kind}" needs packages that are not installed ({error}); '
            f"pip install 'upspiral[{'train' if kind == 'fsdp' else kind}]'"
        ) from error
    return backend(setup)
