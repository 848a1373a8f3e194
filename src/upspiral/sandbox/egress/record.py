"""What is written down of each connection out of a sandbox, and how much a sandbox may use of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EgressLimits:
    """What the proxy of one sandbox allows."""

    connections: int = 64
    """At once; one more is answered with 503."""
    header_bytes: int = 32 * 1024
    """Of a request's or a response's head."""
    header_timeout_s: float = 20.0
    """To send the head of a request, however it is dribbled."""
    connect_timeout_s: float = 20.0
    """To resolve the name and to reach one of its addresses."""
    idle_timeout_s: float = 120.0
    """Without a byte either way."""
    connection_bytes: int = 8 << 30
    """Of one connection, both ways together."""
    total_bytes: int = 64 << 30
    """Of all connections of this proxy, both ways together."""
    records: int = 10_000
    """So many connections are written down, and that there were more."""


@dataclass(frozen=True, slots=True)
class EgressRecord:
    """One connection, when it has ended or was refused."""

    time_s: float
    """When it came, in seconds since 1970."""
    host: str
    """As it was asked for; empty when the request could not be read."""
    port: int
    address: str
    """The one that was connected to; empty when none was."""
    allowed: bool
    reason: str
    """Why it was refused, failed or was cut off; empty when it ended by itself."""
    sent_bytes: int
    """To the destination."""
    received_bytes: int
    """From it."""
    duration_s: float
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the sandbox (`SandboxSpec.labels`), such as the rollout's id."""


@dataclass(slots=True)
class EgressLog:
    """Keeps the first records of all sandboxes and counts the rest."""

    capacity: int = 100_000
    records: list[EgressRecord] = field(default_factory=list)
    dropped: int = 0

    def __call__(self, record: EgressRecord) -> None:
        if len(self.records) < self.capacity:
            self.records.append(record)
        else:
            self.dropped += 1
