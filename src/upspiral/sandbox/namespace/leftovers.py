"""What keepers leave on the machine when they are killed together with their owner: a folder and control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from upspiral.sandbox.namespace.keeper.control_groups import mounted_hierarchies, remove_all
from upspiral.sandbox.owner import is_left_over, left_over_folders, remove_tree

KIND = "namespace"
"""In the labels of these."""


def sweep(root: Path | None) -> list[Path]:
    """Removes what owners of the same user have left that have died. Returns what it removed."""
    groups = [group for group in _labelled_groups() if is_left_over(group, KIND)]
    for group in groups:
        remove_all(str(group))
    folders = left_over_folders(root, KIND)
    for folder in folders:
        remove_tree(folder)
    return [*folders, *groups]


def remove_groups(label: str) -> None:
    """Those of a keeper that is dead, whose owner lives."""
    for group in _labelled_groups():
        if group.name == label:
            remove_all(str(group))


def _labelled_groups() -> Iterator[Path]:
    """Those that freeze first: nothing that is frozen can die."""
    places = mounted_hierarchies()
    for place in dict.fromkeys(places[name] for name in sorted(places, key=lambda name: name != "freezer")):
        for folder, below, _ in os.walk(place):
            labelled = [name for name in below if name.startswith(f"upspiral-{KIND}-")]
            yield from [Path(folder, name) for name in labelled]
            below[:] = [name for name in below if name not in labelled]
