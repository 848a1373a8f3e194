"""Arguments that are written as plain text: their types come from the tool's JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from upspiral.rendering.formats.base import CallError
from upspiral.rendering.formats.json_calls import dump_json
from upspiral.types import ToolSpec

_ANY = frozenset({"string", "number", "boolean", "null", "object", "array"})
_PYTHON_CONSTANTS = {"True": True, "False": False, "None": None}
"""Some templates write arguments the way Python prints them, and models learn it."""


def value_text(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else dump_json(value)


def typed_arguments(name: str, texts: Sequence[tuple[str, str]], tools: Sequence[ToolSpec]) -> dict[str, Any]:
    """The values of a call's arguments. A string stays a string where the schema allows nothing else; other text is
    read as JSON if that fits the schema, and is a string otherwise."""
    properties = next((tool.parameters.get("properties") for tool in tools if tool.name == name), None)
    schemas = properties if isinstance(properties, Mapping) else {}
    arguments: dict[str, Any] = {}
    for key, text in texts:
        if key in arguments:
            raise CallError(f"({name}): the argument {key!r} is given twice")
        arguments[key] = _value(text, _types(schemas.get(key)))
    return arguments


def _value(text: str, types: frozenset[str]) -> Any:
    if types == {"string"}:
        return text
    stripped = text.strip()
    if stripped in _PYTHON_CONSTANTS:
        value = _PYTHON_CONSTANTS[stripped]
    else:
        try:
            value = json.loads(stripped, parse_constant=_refuse_constant)
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError):
            return text
    return text if isinstance(value, str) or _type_of(value) not in types else value


def _types(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows, "integer" counted as "number"; all of them when it does not say."""
    if not isinstance(schema, Mapping):
        return _ANY
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), Sequence) and options:
            return frozenset().union(*map(_types, options))
    kinds = schema.get("type")
    if kinds is not None:
        names = [kinds] if isinstance(kinds, str) else kinds
        return frozenset("number" if name == "integer" else str(name) for name in names)
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    return _ANY if values is None else frozenset(map(_type_of, values))


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), (int | float, "number"), (str, "string"), (Mapping, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "array")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
