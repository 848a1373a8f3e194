"""The text of single tokens, for pages that show them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from upspiral.dashboard.conversation import TokenTexts
from upspiral.errors import UpspiralError
from upspiral.rendering.renderer import Renderer
from upspiral.weights.models import resolve_model

END_OF_TURN = "■"
"""Stands for the sampled stop token, which has no text."""


def load_token_texts(model: str) -> TokenTexts | None:
    """How to read the tokens of a run's model, by the name in its config. None when its tokenizer is not at hand: a
    page about a run must open anywhere."""
    if not model:
        return None
    try:
        renderer = Renderer.from_folder(Path(resolve_model(model, weights=False)))
    except (UpspiralError, OSError):
        return None
    return lambda token_ids: token_texts(renderer, token_ids)


def token_texts(renderer: Renderer, token_ids: Sequence[int]) -> list[str]:
    """One text a token; joined they are the text of all. A character of several tokens stands at its last one."""
    decoder = renderer.text_decoder()
    texts = [decoder.push([token_id]) for token_id in token_ids]
    if texts:
        texts[-1] += decoder.finish()
        if token_ids[-1] in renderer.stop_token_ids:
            texts[-1] += END_OF_TURN
    return texts
