"""Python's cyclic garbage collector, set for a process that holds many live rollouts.

A full collection looks at every object there is. With Python's settings a gateway of a few thousand rollouts spends 40%
of its time in collections and stops for half a second at each; what it drops holds next to no cycles.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = (10_000, 10, 100)
"""Containers made until the young are looked at, and how often that happens until the older and all of them are."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """What exists when the context opens (modules, model, templates) is left out of collections; full ones are rare."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
