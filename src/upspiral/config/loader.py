"""From a TOML file and dotted flags to a RunConfig, and back. Every error names the key, what was given and a fix."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from upspiral.config.combinations import contradictions, switched_off
from upspiral.config.keys import all_keys, nearest_keys, sections
from upspiral.config.models import RunConfig
from upspiral.errors import ConfigError

Overrides = Mapping[str, str] | Sequence[tuple[str, str]]


def load_run_config(path: Path, overrides: Overrides = ()) -> RunConfig:
    """Reads a run file; `overrides` are dotted keys with values in TOML syntax, a bare word counting as a string.

    A relative `agent.file` is resolved against the folder of the run file. Raises ConfigError with every problem found.
    """
    given = _Given(path.name, _flatten(_read_toml(path)), _parsed(overrides))
    try:
        config = RunConfig.model_validate(given.nested())
    except ValidationError as error:
        raise _config_error([line for detail in error.errors() for line in _describe(detail, given)]) from None
    config = _with_resolved_files(config, path.parent)
    problems = list(_misfits(config, given))
    if problems:
        raise _config_error(problems)
    return config


def dump_toml(config: RunConfig) -> str:
    """The whole config as TOML, defaults included; `load_run_config` reads it back to an equal config.

    Keys that are unset, or that the run never reads, are left out: giving them would be an error.
    """
    off = {key for key in switched_off(config) if _value_of(config, key) == all_keys()[key].default}
    tables: dict[str, list[str]] = {}  # a table may be begun only once, and others may stand among its keys
    for key in all_keys():
        value = _value_of(config, key)
        if value is None or key in off:
            continue
        table, _, leaf = key.rpartition(".")
        tables.setdefault(table, ["", f"[{table}]"] if table else []).append(f"{leaf} = {toml_value(value)}")
    return "\n".join(line for lines in tables.values() for line in lines) + "\n"


def toml_value(value: Any) -> str:
    """A string, number, boolean, table or list of them in TOML syntax."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_none=True)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which only TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(each) for each in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(each)}" for key, each in value.items()) + "}"
    return str(value)


@dataclass(frozen=True, slots=True)
class _Given:
    """What the user wrote, by dotted key: flags win over the file."""

    file_name: str
    in_file: Mapping[str, Any]
    on_command_line: Mapping[str, Any]

    def nested(self) -> dict[str, Any]:
        root: dict[str, Any] = {}
        for key, value in {**self.in_file, **self.on_command_line}.items():
            *tables, leaf = key.split(".")
            table = root
            for name in tables:
                table = table.setdefault(name, {})
                if not isinstance(table, dict):
                    raise ConfigError(f"{key}: {name} is not a section")
            table[leaf] = value
        return root

    def show(self, key: str) -> str:
        """The key with what was given for it and where."""
        if key in self.on_command_line:
            return f"{key} = {toml_value(self.on_command_line[key])} on the command line"
        if key in self.in_file:
            return f"{key} = {toml_value(self.in_file[key])} in {self.file_name}"
        if key in all_keys():
            return f"{key} = {toml_value(all_keys()[key].default)} (the default)"
        return f"{key} in {self.file_name}"

    def under(self, key: str) -> list[str]:
        """The given keys that are `key` or lie in the section of that name."""
        return [each for each in {**self.in_file, **self.on_command_line} if each == key or each.startswith(f"{key}.")]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no run file at {path}; recipes/ has some to start from") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give a run file (.toml)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        elif not isinstance(value, dict) or prefix + name not in sections():
            flat[prefix + name] = value
    return flat


def _parsed(overrides: Overrides) -> dict[str, Any]:
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    return {key: _parse_value(key, text) for key, text in pairs}


def _parse_value(key: str, text: str) -> Any:
    known = all_keys().get(key)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    wants_text = known is not None and known.annotation in (str, str | None)
    return text if wants_text and not isinstance(value, str) else value


def _describe(detail: ErrorDetails, given: _Given) -> Iterator[str]:
    """One line for each key that a pydantic error is about."""
    message = detail["msg"].removeprefix("Value error, ")
    parts = list(detail["loc"])
    entry = next((index for index, part in enumerate(parts) if isinstance(part, int)), len(parts))
    location = ".".join(str(part) for part in parts[:entry])
    if entry < len(parts) - 1:
        inside = ".".join(str(part) for part in parts[entry + 1 :])
        yield f"{location}[{parts[entry]}].{inside} in {given.file_name}: {message[:1].lower()}{message[1:]}"
    elif detail["type"] == "extra_forbidden":
        yield from (f"{given.show(key)}: no such key; {_suggestion(key)}" for key in given.under(location))
    elif detail["type"] == "missing":
        yield f"{given.file_name} has no [{location}] section; {_what_it_needs(location)}"
    elif detail["type"] in {"model_type", "model_attributes_type"}:
        yield f"{given.show(location)}: it is a section; write its keys below a line [{location}]"
    elif location in sections() or not location:
        yield f"{message} (in {given.file_name})"
    elif location in all_keys() and location not in given.under(location):
        yield from (f"{given.show(key)}: no such key; {location} is not a section" for key in given.under(location))
    else:
        yield f"{given.show(location)}: {message[:1].lower()}{message[1:]}{_nearest_value(detail)}"


def _nearest_value(detail: ErrorDetails) -> str:
    """Where only certain words are allowed: the one that was most likely meant."""
    if detail["type"] != "literal_error" or not isinstance(detail["input"], str):
        return ""
    allowed = re.findall(r"'([^']*)'", detail.get("ctx", {}).get("expected", ""))
    close = get_close_matches(detail["input"], allowed, n=1)
    return f"; did you mean {toml_value(close[0])}?" if close else ""


def _what_it_needs(section: str) -> str:
    needed = {"agent": "set agent.file, agent.command or agent.kind"}
    return needed.get(section, "add it")


def _suggestion(key: str) -> str:
    nearest = nearest_keys(key)
    if nearest:
        return f"did you mean {' or '.join(nearest)}?"
    section = key.rpartition(".")[0]
    siblings = [each for each in all_keys() if each.rpartition(".")[0] == section]
    if siblings:
        return f"valid are {', '.join(siblings)}"
    return f"the sections are {', '.join(sections())}"


def _with_resolved_files(config: RunConfig, folder: Path) -> RunConfig:
    update = {}
    for name in ("agent", "env"):
        section = getattr(config, name)
        if section.file is not None:
            update[name] = section.model_copy(update={"file": str((folder / section.file).resolve())})
    return config.model_copy(update=update)


def _misfits(config: RunConfig, given: _Given) -> Iterator[str]:
    """What the types cannot see: keys that do nothing, values that contradict each other, a file that is not there."""
    for key, why in switched_off(config).items():
        if given.under(key):
            yield f"{given.show(key)} does nothing: {why}"
    for key, why in contradictions(config):
        yield f"{given.show(key)}: {why}"
    for key, file in (("agent.file", config.agent.file), ("env.file", config.env.file)):
        if file is not None and not Path(file).is_file():
            yield f"{given.show(key)}: no file at {file}; the path is relative to the run file"


def _value_of(config: RunConfig, key: str) -> Any:
    """None where the key's section is absent."""
    value: Any = config
    for name in key.split("."):
        value = None if value is None else getattr(value, name)
    return value


def _config_error(problems: Sequence[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError(f"{len(problems)} problems in the run:" + "".join(f"\n  {problem}" for problem in problems))
