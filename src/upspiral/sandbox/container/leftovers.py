"""What backends of processes that have died left with an engine: containers, images, folders."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from upspiral.sandbox.container.engine import Engine, RefusedError
from upspiral.sandbox.container.order import OWNER_LABEL
from upspiral.sandbox.owner import Owner, left_over_folders, remove_tree


def sweep(engine: Engine, root: Path | None) -> Sequence[str]:
    """Removes it, and says what it was. Raises SandboxError when the engine cannot be reached."""
    mine = f"label={OWNER_LABEL}"
    containers = engine.ask_now("ps", "--all", f"--filter={mine}", "--format={{.Names}}").split()
    dead = [name for name in containers if _is_dead(name.rpartition("-")[0], engine)]
    images = engine.ask_now("images", f"--filter={mine}", "--format={{.Repository}}:{{.Tag}}").split()
    # The newest are listed first, so that none is removed before those that stand on it.
    stale = [name for name in images if _is_dead(name.rpartition("/")[2].partition(":")[0], engine)]
    for command, names in ((("rm", "--force", "--volumes"), dead), (("rmi", "--force"), stale)):
        for name in names:
            with contextlib.suppress(RefusedError):  # somebody else sweeps at the same time, or the next sweep will
                engine.ask_now(*command, name)
    folders = left_over_folders(root, engine.name)
    for folder in folders:
        remove_tree(folder)
    return [*dead, *stale, *map(str, folders)]


def _is_dead(label: str, engine: Engine) -> bool:
    owner = Owner.of(label, engine.name)
    return owner is not None and owner.is_dead
