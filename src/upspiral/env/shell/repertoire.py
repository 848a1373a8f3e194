"""What a ladder is built from: which questions and edits, and in which shapes they are composed.

hops       the instruction names a file that names a file (that names a file ...): read it first
edits      change the file
questions  ask about what is there now
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from random import Random

from upspiral.env.shell.edits import EDITS
from upspiral.env.shell.kind import Edit, Question
from upspiral.env.shell.questions import QUESTIONS
from upspiral.env.shell.vocabulary import Form
from upspiral.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """How a task is composed. Its difficulty is the number of tool calls that the oracle needs."""

    name: str
    hops: int = 0
    edits: int = 0
    questions: int = 0
    weight: float = 1.0

    @property
    def difficulty(self) -> int:
        return self.hops + self.edits + self.questions


SHAPES: tuple[Shape, ...] = (
    Shape("question", questions=1, weight=len(QUESTIONS)),
    Shape("edit", edits=1, weight=len(EDITS)),
    Shape("pair", questions=2, weight=3),
    Shape("pointer", hops=1, questions=1, weight=3),
    Shape("edit_ask", edits=1, questions=1, weight=2),
    Shape("pointer_edit", hops=1, edits=1),
    Shape("triple", questions=3, weight=2),
    Shape("pointer_pair", hops=1, questions=2, weight=2),
    Shape("chain", hops=2, questions=1, weight=2),
    Shape("edit_pair", edits=1, questions=2),
    Shape("pointer_edit_ask", hops=1, edits=1, questions=1),
    Shape("chain_pair", hops=2, questions=2),
    Shape("chain_edit_ask", hops=2, edits=1, questions=1),
    Shape("pointer_edit_pair", hops=1, edits=1, questions=2),
)

LEVELS: tuple[int, ...] = tuple(sorted({shape.difficulty for shape in SHAPES}))


@dataclass(frozen=True, slots=True)
class Repertoire:
    """The questions, edits and shapes of one environment. Every shape can be made of its questions and edits."""

    questions: tuple[Question, ...]
    edits: tuple[Edit, ...]
    shapes: tuple[Shape, ...]

    @classmethod
    def named(cls, kinds: Sequence[str], shapes: Sequence[str]) -> Repertoire:
        """Those of the given names, all where none is named. Raises ConfigError for names that do not exist, and for
        shapes that the kinds cannot make; shapes that are not named and cannot be made are left out."""
        _check_names("env.kinds", kinds, [kind.name for kind in (*QUESTIONS, *EDITS)])
        _check_names("env.shapes", shapes, [shape.name for shape in SHAPES])
        chosen = cls(
            tuple(question for question in QUESTIONS if not kinds or question.name in kinds),
            tuple(edit for edit in EDITS if not kinds or edit.name in kinds),
            tuple(shape for shape in SHAPES if not shapes or shape.name in shapes),
        )
        possible = tuple(shape for shape in chosen.shapes if chosen._can_make(shape))
        if shapes and len(possible) < len(chosen.shapes):
            missing = sorted(shape.name for shape in set(chosen.shapes) - set(possible))
            raise ConfigError(f"env.shapes = {missing}: env.kinds has too few questions or edits for them; add some")
        return cls(chosen.questions, chosen.edits, possible)

    def draw_kinds(self, rng: Random, shape: Shape) -> tuple[Edit | None, Sequence[Question]]:
        """An edit, if the shape has one, and questions that fit the same form."""
        if shape.edits:
            edit = rng.choice(self._edits_for(shape))
            return edit, rng.sample(self._about(edit.form), shape.questions)
        first = rng.choice(self._questions_for(shape))
        others = [question for question in self._about(first.form) if question is not first]
        return None, [first, *rng.sample(others, shape.questions - 1)]

    def _can_make(self, shape: Shape) -> bool:
        if shape.edits:
            return bool(self._edits_for(shape))
        if shape.hops:
            return bool(self._questions_for(shape))
        return len(self.questions) >= shape.questions

    def _about(self, form: Form) -> list[Question]:
        return [question for question in self.questions if question.form is form]

    def _questions_for(self, shape: Shape) -> list[Question]:
        return [question for question in self.questions if len(self._about(question.form)) >= shape.questions]

    def _edits_for(self, shape: Shape) -> list[Edit]:
        followed = shape.questions > 0
        fitting = [edit for edit in self.edits if not followed or (edit.can_be_followed and edit.form is Form.WORDS)]
        return [edit for edit in fitting if len(self._about(edit.form)) >= shape.questions]


def _check_names(key: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {sorted(known)}"
            raise ConfigError(f"{key}: there is no {name!r}; {hint}")
