"""Places that a run has reserved, known by its folder: what one dead actor of it had, the next one gives back."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from pathlib import Path


def reservation(folder: Path) -> str:
    """A name for a placement group of a run."""
    return f"{_prefix(folder)}{secrets.token_hex(4)}"


def give_back(folder: Path) -> None:
    """Removes the groups that this run made before. Ray does so when the job ends, and not when the actor that made
    them dies."""
    import ray

    for table in ray.util.placement_group_table().values():
        if table["name"].startswith(_prefix(folder)) and table["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # it is just being removed
                ray.util.remove_placement_group(ray.util.get_placement_group(table["name"]))


def _prefix(folder: Path) -> str:
    return f"upspiral-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}-"
