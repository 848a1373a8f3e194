"""What all kinds of questions and edits have in common: phrasings, a command, and a truth computed in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from upspiral.env.shell.files import Draw, Files
from upspiral.env.shell.vocabulary import Form

Slots = Mapping[str, str]
"""What fills the holes of a phrasing and of a command, besides {path}."""

K = TypeVar("K", bound="Kind")
ChooseSlots = Callable[[Draw, Files, str], Slots]


def no_slots(_draw: Draw, _files: Files, _path: str) -> Slots:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A sort of single-command step. `train` and `heldout` are phrasings, `command` is what the oracle types."""

    name: str
    form: Form
    command: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    choose: ChooseSlots = no_slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Question(Kind):
    """Asks for something that one command prints."""

    answer: Callable[[Files, str, Slots], str | None]
    """None when these files have no single right answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit(Kind):
    """Changes files. `apply` gives the files afterwards; one that writes another file has a slot "target"."""

    apply: Callable[[Files, str, Slots], Files]
    can_be_followed: bool = True
    """Whether there is something afterwards that is worth a question."""


@dataclass(frozen=True, slots=True)
class Step(Generic[K]):
    """A kind applied to a path."""

    kind: K
    path: str
    slots: Slots

    @property
    def command(self) -> str:
        return self.kind.command.format(path=self.path, **self.slots)

    @property
    def result_path(self) -> str:
        """Where the outcome of an edit lies."""
        return self.slots.get("target", self.path)

    def phrase(self, draw: Draw, split: str, subject: str) -> str:
        """The step in words; `subject` stands for the path, for example "that file"."""
        phrasings = self.kind.train if split == "train" else self.kind.heldout
        return draw.rng.choice(phrasings).format(path=subject, **self.slots)
