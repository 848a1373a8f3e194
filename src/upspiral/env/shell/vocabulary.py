"""The words that tasks are made of. Train and held-out share none of them, so that held-out success cannot be recall.

Within one split no word is part of another: `grep oak` finds oak and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Form(StrEnum):
    """What a question or an edit is about."""

    WORDS = "words"
    """One word a line."""
    PROSE = "prose"
    """A few words a line."""
    NUMBERS = "numbers"
    """One number a line."""
    TABLE = "table"
    """name,number a line."""
    SETTINGS = "settings"
    """key=value a line."""
    FOLDER = "folder"
    """A folder of WORDS files."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Everything by which the files of one split can be told from those of the other."""

    words: tuple[str, ...]
    """Stand in files."""
    stems: tuple[str, ...]
    """File names without extension."""
    folders: tuple[str, ...]
    depths: tuple[int, ...]
    """How many folders a file may lie in."""
    keys: tuple[str, ...]
    """Of settings."""
    extensions: Mapping[Form, tuple[str, ...]]
    """By the form of the file; for a folder: of the files in it."""


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TRAIN = Vocabulary(
    words=_split(
        "oak lamp river apple stone tiger cloud bread chair green horse salt moon paper robot glass sugar "
        "train violin wheat zebra candle desk eagle forest garden honey island jacket kite"
    ),
    stems=_split(
        "notes list data items report names values record draft memo sample order stock index main draw plan task "
        "group score"
    ),
    folders=_split("docs logs src work cases home temp store project inbox"),
    depths=(0, 1),
    keys=_split("port size color mode speed level host limit"),
    extensions={
        Form.WORDS: ("txt", "log", "md"),
        Form.PROSE: ("txt", "log", "md"),
        Form.NUMBERS: ("txt", "log"),
        Form.TABLE: ("csv",),
        Form.SETTINGS: ("conf", "ini"),
        Form.FOLDER: ("txt", "log", "md"),
    },
)

HELDOUT = Vocabulary(
    words=_split(
        "pear silver wolf castle piano flower winter bridge spoon dragon copper melon ocean pencil rocket "
        "tunnel velvet yellow anchor basket camel diamond falcon hammer"
    ),
    stems=_split("input table words result numbers entry journal archive catalog ledger summary survey batch page"),
    folders=_split("backup media research office shared current export library"),
    depths=(1, 2),
    keys=_split("width theme region timeout depth user"),
    extensions={
        Form.WORDS: ("dat", "lst", "out"),
        Form.PROSE: ("dat", "lst", "out"),
        Form.NUMBERS: ("dat", "out"),
        Form.TABLE: ("tbl",),
        Form.SETTINGS: ("cfg", "env"),
        Form.FOLDER: ("dat", "lst", "out"),
    },
)

BY_SPLIT = {"train": TRAIN, "heldout": HELDOUT}
