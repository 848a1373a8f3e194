"""What the host asks the keeper for when it wants a sandbox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AGENT_ID = 1000
"""Commands on the machine's own programs run as this user, whose name is "agent"."""


@dataclass(frozen=True, slots=True)
class Order:
    """One sandbox, in numbers and paths; it travels as JSON."""

    name: str
    """Chosen by the host, never used twice."""
    user: int
    """The one id that there is inside."""
    layers: Sequence[str]
    """Folders of the image on this machine, top first. None: the machine's own programs, read-only."""
    snapshot: str | None
    """Stand on this one's layers, and on its image."""
    mounts: Mapping[str, str]
    """Path inside -> folder or file on this machine, to be seen there read-only."""
    disk_bytes: int
    inodes: int
    memory_bytes: int
    processes: int
    cpus: float | None
    lifetime_s: float
    agent: Mapping[str, object]
    """For `inside.Settings`."""
    ends_at: float = 0.0
    """By the keeper's monotonic clock, which does not begin anew with a new agent."""
