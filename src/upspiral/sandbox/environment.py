"""What a process can be given as its environment."""

from __future__ import annotations

from collections.abc import Mapping


def check_environment(env: Mapping[str, str]) -> None:
    """Raises ValueError, naming the variable and not its value, which may be a secret."""
    for name, value in env.items():
        if not (isinstance(name, str) and isinstance(value, str) and is_plain(name + value)) or not name or "=" in name:
            raise ValueError(
                f"env: {name!r} cannot be in an environment; names and values are strings without NUL and without "
                "half of a surrogate pair, and a name is not empty and has no ="
            )


def is_plain(text: str) -> bool:
    """The system can be given it. A model may write half a surrogate pair, which stands for no byte."""
    try:
        return b"\0" not in text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
