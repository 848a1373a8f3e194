"""Places that a run has reserved, known by its folder: what one dead actor of it had, the next one gives back."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOM_DEADLINE_S = 900.0
"""Another run may have to end first."""


def reservation(folder: Path) -> str:
    """A name for a placement group of a run."""
    return f"{_prefix(folder)}{secrets.token_hex(4)}"


def reserve(bundle: Mapping[str, float], count: int, name: str) -> Any:
    """Ray's placement group of so many bundles, which it gets all at once when there is room. `name`: see
    `reservation`."""
    import ray

    # GPUs talk to each other, best within a machine; without any, cores are what there is most of on many.
    strategy = "PACK" if "GPU" in bundle else "SPREAD"
    return ray.util.placement_group([dict(bundle)] * count, strategy=strategy, name=name)


def within(group: Any, bundle: int) -> Any:
    """The scheduling strategy of what goes into a bundle."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)


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
