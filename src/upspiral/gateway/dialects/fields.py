"""Reading fields of a JSON request, with errors that name the place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from upspiral.errors import RequestError


def text_field(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{where}.{key} must be a non-empty string, not {shown(value)}")
    return value


def object_field(entry: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object; {} when the field is absent or null."""
    value = entry.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{where}.{key} must be an object, not {shown(value)}")
    return value


def list_field(entry: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    """A list of objects; [] when the field is absent or null."""
    value = entry.get(key)
    if value is None:
        return []
    place = f"{where}.{key}" if where else key
    if not isinstance(value, list):
        raise RequestError(f"{place} must be a list, not {shown(value)}")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise RequestError(f"{place}[{index}] must be an object, not {shown(item)}")
    return value


def flag_field(entry: Mapping[str, Any], key: str, default: bool) -> bool:
    value = entry.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{key} must be true or false, not {shown(value)}")
    return value


def whole_field(entry: Mapping[str, Any], key: str, *, least: int, most: int = 2**63 - 1) -> int | None:
    value = entry.get(key)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        limits = f"from {least} to {most}" if most < 2**63 - 1 else f"of at least {least}"
        raise RequestError(f"{key} must be an integer {limits}, not {shown(value)}")
    return value


def number_field(entry: Mapping[str, Any], key: str, *, least: float, most: float = math.inf) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        limits = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
        raise RequestError(f"{key} must be a number {limits}, not {shown(value)}")
    return float(value)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
