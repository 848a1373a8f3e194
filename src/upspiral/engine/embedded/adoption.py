"""Published weights become those of a module: read and checked beside its use, then copied in place in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from upspiral.errors import EngineError, StaleBaseError
from upspiral.weights.names import OUTPUT, hugging_face_views
from upspiral.weights.publication import Publication
from upspiral.weights.receiver import Damaged, Receiver, StaleBase


class Adoption:
    """Of one module. Differences cost a copy of the weights, which the next one is added to."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._receiver = Receiver()
        self._given_up: list[tuple[UntypedStorage, int]] = []
        """Storages of weights, with their sizes before."""

    @contextmanager
    def checked(self, publication: Publication) -> Iterator[Callable[[], None]]:
        """What copies the weights into the module, while the block lasts; it cannot fail. Raises StaleBaseError and
        EngineError as `UpdatableEngine.update_weights` does, and the module is as it was. Where weights were given up,
        their memory is taken again."""
        try:
            with self._receiver.reading(publication.folder) as tensors:
                self._take_again()
                pairs = self._pairs(dict(tensors), publication)
                yield lambda: _copy(pairs)
        except (StaleBase, Damaged) as error:
            # Whatever a difference lacks, the whole has; of what is whole, only its writer can tell what is wrong.
            kind = EngineError if publication.base is None else StaleBaseError
            raise kind(f"{error}; publish version {publication.version} whole") from error

    def give_up(self) -> None:
        """Frees the weights until others are adopted. Parameters stay what they are, without values, and those that are
        views of one tensor stay that."""
        storages: dict[int, UntypedStorage] = {}
        for parameter in self._module.parameters():
            if not parameter.untyped_storage().resizable():  # it is part of the model's file, and no view of another
                parameter.data = torch.empty_like(parameter.data)
            storages[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage()
        self._given_up = [(each, each.nbytes()) for each in storages.values()]
        for storage, _ in self._given_up:
            storage.resize_(0)

    def _take_again(self) -> None:
        """Room for what was given up. Raises EngineError when there is none."""
        try:
            for storage, size in self._given_up:
                storage.resize_(size)
        except RuntimeError as error:  # of an allocator
            raise EngineError(
                f"there is no memory for the weights of an engine that slept ({error}); what the trainer keeps must "
                "fit beside them: divide it over more ranks, or set engine.colocated = false"
            ) from error
        self._given_up = []

    def _pairs(self, found: dict[str, Tensor], publication: Publication) -> list[tuple[Tensor, Tensor]]:
        """Each place in the module with what goes there."""
        places = hugging_face_views(self._module)
        if self._module.config.tie_word_embeddings:
            places.pop(OUTPUT)  # it is the embedding
            found.pop(OUTPUT, None)
        if (expected := _forms(places)) != (published := _forms(found)):
            name = sorted(expected.items() ^ published.items(), key=str)[0][0]
            raise EngineError(
                f"{publication.folder} has other tensors than this engine's model: {name} is "
                f"{published.get(name, 'not there')}, here it is {expected.get(name, 'unknown')}; publish weights of "
                "the same model in the precision of model.dtype"
            )
        return [(place, found[name]) for name, place in places.items()]


def _forms(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {[*tensor.shape]}" for name, tensor in tensors.items()}


@torch.no_grad()
def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for place, tensor in pairs:
        place.copy_(tensor)
