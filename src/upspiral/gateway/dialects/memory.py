"""What a rollout's dialects remember between requests."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

MOST_ENTRIES = 4096
MOST_BYTES = 8 * 2**20
"""Of all entries together, as their owners estimate them."""


class Memory:
    """Entries by id; the oldest are forgotten when there are too many or they are too large."""

    def __init__(self, most_entries: int = MOST_ENTRIES, most_bytes: int = MOST_BYTES) -> None:
        self._entries: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._most_entries = most_entries
        self._most_bytes = most_bytes
        self._bytes = 0

    def keep(self, key: str, value: Any, size_bytes: int) -> None:
        """Remembers a value, even one that alone is larger than the limit, until the next one comes."""
        self.forget(key)
        self._entries[key] = (value, size_bytes)
        self._bytes += size_bytes
        while len(self._entries) > self._most_entries or (self._bytes > self._most_bytes and len(self._entries) > 1):
            self.forget(next(iter(self._entries)))

    def find(self, key: str) -> Any | None:
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def forget(self, key: str) -> bool:
        """Whether there was something to forget."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry[1]
        return entry is not None
