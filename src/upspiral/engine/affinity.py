"""Which engine computed which prefix last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

import numpy as np

BLOCK_TOKENS = 32
_MOST_BLOCKS = 1 << 18
"""About 30 MB; those that nobody asked for longest are forgotten."""


class Affinity:
    """Prefixes in blocks of tokens, each known by a hash of all up to its end. A collision sends a generation to an
    engine that has to compute its prefix: it costs time and nothing else."""

    def __init__(self, most_blocks: int = _MOST_BLOCKS) -> None:
        self._most_blocks = most_blocks
        self._owners: OrderedDict[int, int] = OrderedDict()

    def learn(self, token_ids: np.ndarray, owner: int) -> None:
        """The owner is about to compute these tokens."""
        for block in _blocks(token_ids):
            self._owners[block] = owner
            self._owners.move_to_end(block)
        while len(self._owners) > self._most_blocks:
            self._owners.popitem(last=False)

    def longest(self, token_ids: np.ndarray, among: Collection[int]) -> int | None:
        """Who of `among` computed the longest prefix of the tokens; None when nobody did."""
        found = None
        for block in _blocks(token_ids):
            owner = self._owners.get(block)
            if owner is None:
                break
            found = owner if owner in among else found
        return found

    def forget(self, owner: int) -> None:
        self._owners = OrderedDict((block, each) for block, each in self._owners.items() if each != owner)


def _blocks(token_ids: np.ndarray) -> Iterator[int]:
    data, width = np.ascontiguousarray(token_ids, np.int32).tobytes(), 4 * BLOCK_TOKENS
    before = 0
    for start in range(0, len(data) - width + 1, width):
        before = hash((before, data[start : start + width]))
        yield before
