"""Calls that are JSON: strict reading, with errors that say what is wrong."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from upspiral.rendering.formats.base import CallError
from upspiral.types import ToolCall

_TOKEN = re.compile(r'[^"{}\[\]]+|"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)

_BRACKET = re.compile(r"[{\[]")


def json_end(text: str, start: int = 0) -> int | None:
    """Where the object or list that begins at `start` ends; None when its brackets are not balanced yet."""
    return _scan(text, start)[0]


def ends_inside_string(text: str) -> bool:
    """Whether the JSON in a text, from the first bracket on, breaks off inside a string."""
    bracket = _BRACKET.search(text)
    return bracket is not None and _scan(text, bracket.start())[1]


def load_json(text: str) -> Any:
    """Raises CallError. NaN and half surrogate pairs, which no HTTP answer could carry, are refused as well."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise CallError(f"is not valid JSON: {error}: {text.strip()[:200]!r}") from error
    return value


def call_from_entry(entry: Any, *keys: str) -> ToolCall:
    """The call of `{"name": ..., KEY: {...}}`, KEY being the first of `keys` that is there. Raises CallError."""
    if not isinstance(entry, dict):
        raise CallError(f"is not a JSON object but {type(entry).__name__}")
    if not isinstance(entry.get("name"), str) or not entry["name"]:
        raise CallError(f'has no "name" that is a string; its keys are {sorted(entry)}')
    key = next((key for key in keys if key in entry), keys[0])
    return make_call(entry["name"], entry.get(key, {}), field=f'"{key}"')


def make_call(name: str, arguments: Any, *, field: str = "what follows", call_id: str | None = None) -> ToolCall:
    """Raises CallError when the arguments are not an object or there is no name."""
    if not name:
        raise CallError("has no name")
    if not isinstance(arguments, dict):
        raise CallError(f"({name}): {field} is not a JSON object but {type(arguments).__name__}")
    return ToolCall(call_id or f"call_{secrets.token_hex(8)}", name, dump_json(arguments))


def dump_json(value: Any) -> str:
    """As chat templates write it: a space after commas and colons, no escapes beyond what JSON needs."""
    return json.dumps(value, ensure_ascii=False)


def same_json(text: str) -> str:
    """The arguments of a call in the spelling of `dump_json`."""
    return dump_json(json.loads(text))


def _scan(text: str, start: int) -> tuple[int | None, bool]:
    """Where the brackets that open at `start` close, and whether the text ends inside a string before that."""
    depth, position = 0, start
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None, True
        position = match.end()
        depth += (match[0] in "{[") - (match[0] in "}]")
        if depth == 0:
            return position, False
    return None, False


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
