"""What changed of a tensor, to the bit. `receiver.py` has the other half: it stands alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 128


def difference(old: NDArray[Any], new: NDArray[Any]) -> NDArray[np.uint8] | None:
    """New values of the elements that changed, then for each the number of elements between it and the one before, a
    byte each. Empty when nothing changed; None when the new tensor takes no more bytes.

    `old`, `new`: [N] elements as unsigned integers of their size. Where nothing changed for long, an element is sent
    that did not change, so that a byte always suffices.
    """
    changed = np.flatnonzero(old != new)
    if not len(changed):
        return np.empty(0, np.uint8)
    if len(changed) * (new.itemsize + 1) >= new.nbytes:
        return None
    # Something of every block of 128: then at most 254 elements lie between two.
    unchanged = np.ones(changed[-1] // _BLOCK + 1, np.bool_)
    unchanged[changed // _BLOCK] = False
    fillers = np.flatnonzero(unchanged) * _BLOCK
    if len(fillers):
        changed = np.sort(np.concatenate([changed, fillers]), kind="stable")
    between = (np.diff(changed, prepend=-1) - 1).astype(np.uint8)
    values = new[changed].view(np.uint8)
    return None if len(values) + len(between) >= new.nbytes else np.concatenate([values, between])
