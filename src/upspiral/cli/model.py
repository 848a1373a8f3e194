"""`upspiral model`: fetch models into the cache, list what is known."""

from __future__ import annotations

import sys

from upspiral.weights.models import KNOWN_MODELS, cached_model, get_model


def get(name: str, /) -> None:
    """Fetch a known model into the cache and print its folder. Does nothing when it is there.

    Parameters
    ----------
    name
        A name from `upspiral model list`.
    """
    print(get_model(name, progress=lambda line: print(line, file=sys.stderr, flush=True)))


def list_models() -> None:
    """List the models that can be fetched by name. A local Hugging Face folder or a hub id works anywhere as well."""
    for model in KNOWN_MODELS.values():
        folder = cached_model(model.name)
        print(f"{model.name}  {model.about}  [{folder or 'not fetched'}]")
