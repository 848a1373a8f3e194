"""Published weights have Hugging Face's names and forms: what a module's parameters are called, and how they are cut.

transformers stacks the experts of a layer in two parameters; `save_pretrained` and every engine have them one by one.
Everything here is a view, so the same list says what to publish and where to put what was published.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def hugging_face_tensors(parameters: Iterable[tuple[str, Tensor]], *, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors to publish, from a module's named parameters, each of them whole (gathered, on any device).

    Lazy: a parameter is asked for when its parts are. `tied`: the output layer is the embedding, so it is named too, or
    vLLM's CPU build would keep the old one.
    """
    for name, parameter in parameters:
        weight = parameter.detach()
        yield from _parts(name, weight)
        if tied and name == EMBEDDING:
            yield OUTPUT, weight  # the same object, so that a publisher sees that it has it already
        del parameter, weight  # or they would be held while the next one is gathered


def hugging_face_views(module: Any) -> dict[str, Tensor]:
    """Every published name of a causal language model of ours, and the part of its parameters that it stands for: write
    there to adopt what was published."""
    return dict(hugging_face_tensors(module.named_parameters(), tied=module.config.tie_word_embeddings))


def _parts(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`gate_up_proj` [experts, 2 * width, hidden] and `down_proj` [experts, hidden, width] of a layer become one weight
    for each expert and projection; everything else stays as it is."""
    layer, _, own = name.rpartition(".experts.")
    if own == "gate_up_proj":
        for number, expert in enumerate(parameter.unbind()):
            gate, up = expert.chunk(2)
            yield f"{layer}.experts.{number}.gate_proj.weight", gate
            yield f"{layer}.experts.{number}.up_proj.weight", up
    elif own == "down_proj":
        for number, expert in enumerate(parameter.unbind()):
            yield f"{layer}.experts.{number}.down_proj.weight", expert
    else:
        yield name, parameter
