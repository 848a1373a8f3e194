"""Reading fields of a JSON request, with errors that name the place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from upspiral.errors import RequestError


class FieldError(RequestError):
    """A field of a request is wrong. `field` is its path, such as `messages[2].content`."""

    def __init__(self, field: str, complaint: str) -> None:
        super().__init__(f"{field} {complaint}")
        self.field = field


def place(where: str, key: str) -> str:
    """The path of a field of the object at `where`; "" is the body itself."""
    return f"{where}.{key}" if where else key


def text_field(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise FieldError(place(where, key), f"must be a non-empty string, not {shown(value)}")
    return value


def optional_text(entry: Mapping[str, Any], key: str, where: str = "") -> str:
    """A string; "" when the field is absent or null."""
    value = entry.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FieldError(place(where, key), f"must be a string, not {shown(value)}")
    return value


def object_field(entry: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object; {} when the field is absent or null."""
    value = entry.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FieldError(place(where, key), f"must be an object, not {shown(value)}")
    return value


def list_field(entry: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    """A list of objects; [] when the field is absent or null."""
    value = entry.get(key)
    return [] if value is None else object_list(value, place(where, key))


def object_list(value: Any, where: str) -> list[Mapping[str, Any]]:
    """A list of objects that stands at `where`."""
    if not isinstance(value, list):
        raise FieldError(where, f"must be a list, not {shown(value)}")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise FieldError(f"{where}[{index}]", f"must be an object, not {shown(item)}")
    return value


def text_list(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of non-empty strings; () when the field is absent or null."""
    value = entry.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise FieldError(key, f"must be a list of non-empty strings, not {shown(value)}")
    return tuple(value)


def flag_field(entry: Mapping[str, Any], key: str, default: bool, where: str = "") -> bool:
    value = entry.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise FieldError(place(where, key), f"must be true or false, not {shown(value)}")
    return value


def whole_field(entry: Mapping[str, Any], key: str, *, least: int, most: int = 2**63 - 1) -> int | None:
    value = entry.get(key)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        limits = f"from {least} to {most}" if most < 2**63 - 1 else f"of at least {least}"
        raise FieldError(key, f"must be an integer {limits}, not {shown(value)}")
    return value


def number_field(entry: Mapping[str, Any], key: str, *, least: float, most: float = math.inf) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        limits = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
        raise FieldError(key, f"must be a number {limits}, not {shown(value)}")
    return float(value)


def choice_field(entry: Mapping[str, Any], key: str, choices: Sequence[str], where: str = "") -> str | None:
    """One of the strings; None when the field is absent or null."""
    value = entry.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or value not in choices:
        raise FieldError(place(where, key), f"is {shown(value)}; known are {', '.join(choices)}")
    return value


def arguments_field(entry: Mapping[str, Any], key: str, where: str) -> str:
    """The text of a JSON object, as models write the arguments of a call; "{}" when the field is absent or empty."""
    text = entry.get(key) or "{}"
    try:
        parsed = orjson.loads(text)
    except (TypeError, ValueError) as error:
        raise FieldError(place(where, key), f"of {shown(entry.get('name'))} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise FieldError(place(where, key), f"of {shown(entry.get('name'))} must be a JSON object, not {shown(parsed)}")
    return text


def refuse_unsupported(body: Mapping[str, Any], neutral: Mapping[str, Sequence[Any]], where: str = "") -> None:
    """Raises for a field that would change the answer and is not supported, unless it holds null or one of the values
    that ask for nothing."""
    for key, values in neutral.items():
        value = body.get(key)
        if value is not None and value not in values:
            raise FieldError(place(where, key), f"= {shown(value)} is not supported; leave {key} out")


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
