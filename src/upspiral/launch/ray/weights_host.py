"""The actor through which publications leave a node and come to another one, by Ray's object store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from upspiral.errors import EngineError
from upspiral.weights.mirror import Mirror, files_of
from upspiral.weights.publication import Publication
from upspiral.weights.receiver import Bytes, Damaged
from upspiral.weights.shared_folder import shared_folder

Files = Mapping[str, Sequence[Any]]
"""By name, references to the pieces of each file; the object store has them as long as somebody has these."""
PIECE_DEADLINE_S = 300.0


class WeightsHost:
    """One for each node of a run that weights are sent from or to. What came to it goes when it ends."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._mirror: Mirror | None = None

    def give(self, folder: Path) -> Files:
        """Puts a publication of this node into the object store: once, however many nodes want it."""
        import ray

        try:
            return {name: [ray.put(piece) for piece in pieces] for name, pieces in files_of(folder)}
        except Damaged as error:
            raise EngineError(str(error)) from error

    def find(self, publication: Publication) -> Publication | None:
        """As it lies on this node, if it was the last that came."""
        return self._mirror.find(publication) if self._mirror else None

    def take(self, publication: Publication, files: Files) -> Publication:
        """Lays a publication down on this node, unless it is there. Raises StoreError when there is no room."""
        if self._mirror is None:
            self._mirror = Mirror(self._stack.enter_context(shared_folder()))
        return self._mirror.find(publication) or self._mirror.add(
            publication, {name: _pieces(references) for name, references in files.items()}
        )


def make_weights_host(node: str) -> Any:
    """The actor, on the node of this id."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    host: Any = ray.remote(WeightsHost).options(num_cpus=0, scheduling_strategy=there)
    return host.remote()


def _pieces(references: Sequence[Any]) -> Iterator[Bytes]:
    import ray

    for each in references:
        yield ray.get(each, timeout=PIECE_DEADLINE_S)
