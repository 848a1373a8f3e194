"""What commands with a name came to, so that asking twice does not do it twice."""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

_MAX_RESULTS = 256
_MAX_BYTES = 8 << 20


class Run(Protocol):
    """What is remembered: one run of a command."""

    result: dict[str, Any] | None
    """None while it is under way."""

    def size(self) -> int: ...


R = TypeVar("R", bound=Run)


class Results(Generic[R]):
    """The last commands by op_id: those under way, and those that ended as long as they are few and small."""

    def __init__(self) -> None:
        self._runs: dict[str, R] = {}

    def get(self, name: str) -> R | None:
        return self._runs.get(name) if name else None

    def add(self, name: str, run: R) -> None:
        if name:
            self._runs[name] = run
            self._trim()

    def forget(self, name: str) -> None:
        self._runs.pop(name, None)

    def _trim(self) -> None:
        """The oldest go first. The newest ended one stays, whatever its size."""
        ended = [name for name, run in self._runs.items() if run.result is not None]
        sizes = {name: self._runs[name].size() for name in ended}
        total = sum(sizes.values())
        for name in ended[:-1]:
            if len(sizes) <= _MAX_RESULTS and total <= _MAX_BYTES:
                return
            total -= sizes.pop(name)
            del self._runs[name]
