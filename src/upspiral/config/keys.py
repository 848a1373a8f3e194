"""The keys of a run file, read off the models: what exists, its default, its meaning, and the one nearest to a typo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from types import MappingProxyType, UnionType
from typing import Any, get_args

from pydantic import BaseModel

from upspiral.config.models import RunConfig


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a run file."""

    name: str
    """Dotted, such as "trainer.lr"."""
    annotation: Any
    default: Any
    """None for a key that is unset unless given."""
    doc: str


@cache
def all_keys() -> Mapping[str, Key]:
    """Every key by its dotted name, in the order of the models."""
    return MappingProxyType({key.name: key for key in _keys_of(RunConfig, "")})


def sections() -> list[str]:
    """The names of the tables of a run file."""
    return [name for name, field in RunConfig.model_fields.items() if _section_in(field.annotation)]


def nearest_keys(name: str) -> list[str]:
    """The valid keys that a wrong key most likely meant, best first; empty when nothing is close."""
    names = list(all_keys())
    section, _, leaf = name.rpartition(".")
    neighbours = [each for each in names if each.rpartition(".")[0] == section]
    typed = get_close_matches(leaf, [each.rpartition(".")[2] for each in neighbours], cutoff=0.8)
    if section and typed:
        closeness = {each: SequenceMatcher(None, each, leaf).ratio() for each in typed}
        return [f"{section}.{each}" for each in typed if closeness[each] == max(closeness.values())]
    same_leaf = [each for each in names if each.rpartition(".")[2] == leaf]
    close_section = get_close_matches(section, sections(), n=1) if section else []
    if close_section and f"{close_section[0]}.{leaf}" in same_leaf:
        return [f"{close_section[0]}.{leaf}"]
    if same_leaf:
        return same_leaf
    return get_close_matches(name, neighbours, n=1) or get_close_matches(name, names, n=1)


def _keys_of(model: type[BaseModel], prefix: str) -> list[Key]:
    keys: list[Key] = []
    for name, field in model.model_fields.items():
        section = _section_in(field.annotation)
        if section is not None:
            keys += _keys_of(section, f"{prefix}{name}.")
        else:
            doc = " ".join((field.description or "").split())
            keys.append(Key(prefix + name, field.annotation, field.get_default(), doc))
    return keys


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, be it one that may be absent."""
    choices = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((each for each in choices if isinstance(each, type) and issubclass(each, BaseModel)), None)
