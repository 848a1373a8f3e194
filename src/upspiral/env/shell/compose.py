"""Composes questions and edits into tasks that need one to four tool calls.

    hops       the instruction names a file that names a file (that names a file ...): read it first
    edits      change the file
    questions  ask about what is there now

A shape says how many of each. With hops or edits all questions are about one subject; otherwise each has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upspiral.env.shell.edits import EDITS
from upspiral.env.shell.files import Draw, Files
from upspiral.env.shell.kind import Edit, Kind, Question, Step
from upspiral.env.shell.questions import QUESTIONS
from upspiral.env.shell.vocabulary import Form

DONE = "done"
"""The right answer to a task that asks for a change only."""

_ATTEMPTS = 200


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

_HOP_PHRASES: Mapping[str, Mapping[int, tuple[str, ...]]] = {
    "train": {
        1: (
            "The file {pointer} names a {what}.",
            "Read {pointer}: it names a {what}.",
            "{pointer} contains the path of a {what}.",
            "There is the path of a {what} in {pointer}.",
        ),
        2: (
            "The file {pointer} names a file that names a {what}.",
            "Read {pointer}: it names a file, which names a {what}.",
            "{pointer} contains the path of a file with the path of a {what}.",
            "In {pointer} is the path of a file, and in that one the path of a {what}.",
        ),
    },
    "heldout": {
        1: ("You will find the name of a {what} inside {pointer}.", "Look into {pointer}, which points to a {what}."),
        2: (
            "Inside {pointer} is the name of a file, inside which is the name of a {what}.",
            "Look into {pointer}, which points to a file, which points to a {what}.",
        ),
    },
}

_THEN = {"train": ("Then: {}", "Then answer: {}", "After that: {}"), "heldout": ("Next, {}", "When that is finished: {}")}

_DONE_PHRASES = {
    "train": ("Reply done.", "Then reply done.", "Answer done."),
    "heldout": ("Say done afterwards.", "Finish with the answer done."),
}

_JOIN_PHRASES = {
    "train": (
        "Reply with the {count} results separated by a space.",
        "Give all {count} answers separated by a space.",
        "Write the {count} answers with a space between.",
        "Answer with the {count} results, with a space between.",
    ),
    "heldout": (
        "I want the {count} results on one line with one space between.",
        "State the {count} answers in this order, a space apart.",
    ),
}

_COUNT_WORDS = {2: "two", 3: "three"}


@dataclass(slots=True)
class Composition:
    """A task in the making: what to say, what to type, and what is then true."""

    files: dict[str, str] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    after: Files = field(default_factory=dict)
    """The files as the oracle leaves them."""

    @property
    def instruction(self) -> str:
        return " ".join(self.sentences)

    def truth(self) -> dict[str, Any]:
        return {"answer": " ".join(self.answers) or DONE, "commands": list(self.commands), "after": self._changes()}

    def _changes(self) -> dict[str, str | None]:
        """Every path that matters after an edit (None: gone). Empty when the task asks for no change."""
        if self.after == self.files:
            return {}
        return {path: self.after.get(path) for path in sorted({*self.files, *self.after})}


def compose(draw: Draw, split: str, shape: Shape) -> Composition:
    """Draws until the files give every question a single right answer and the edit matters."""
    for _ in range(_ATTEMPTS):
        attempt = Draw(draw.rng, draw.vocabulary)
        composition = _compose_once(attempt, split, shape)
        if composition is not None:
            return composition
    raise AssertionError(f"no task of shape {shape.name} in {_ATTEMPTS} attempts")


def _compose_once(draw: Draw, split: str, shape: Shape) -> Composition | None:
    composition = Composition()
    shared = shape.hops + shape.edits > 0
    if shared:
        complete = _about_one_subject(composition, draw, split, shape)
    else:
        complete = _independent_questions(composition, draw, split, shape.questions)
    if not complete:
        return None
    if shape.questions == 0:
        composition.sentences.append(draw.rng.choice(_DONE_PHRASES[split]))
    if shape.questions > 1:
        count = _COUNT_WORDS[shape.questions]
        composition.sentences.append(draw.rng.choice(_JOIN_PHRASES[split]).format(count=count))
    return composition


def _independent_questions(composition: Composition, draw: Draw, split: str, count: int) -> bool:
    for question in draw.rng.sample(QUESTIONS, count):
        path, files = draw.subject(question.form)
        composition.files.update(files)
        composition.after = dict(composition.files)
        if not _ask(composition, draw, split, question, path, spoken=path):
            return False
    return True


def _about_one_subject(composition: Composition, draw: Draw, split: str, shape: Shape) -> bool:
    edit, questions = _draw_kinds(draw, shape)
    form = edit.form if edit else questions[0].form
    path, files = draw.subject(form)
    composition.files.update(files)
    spoken = _hop(composition, draw, split, shape.hops, path, form) if shape.hops else path
    composition.after = dict(composition.files)
    if edit:
        step = _edit(composition, draw, split, edit, path, spoken)
        if composition.after == composition.files or not all(composition.after.values()):
            return False
        if step.result_path != path:
            path = spoken = step.result_path
    for i, question in enumerate(questions):
        if not _ask(composition, draw, split, question, path, spoken, after_edit=edit is not None and i == 0):
            return False
    return True


def _draw_kinds(draw: Draw, shape: Shape) -> tuple[Edit | None, Sequence[Question]]:
    """An edit, if the shape has one, and questions that fit the same form."""
    by_form = {form: [question for question in QUESTIONS if question.form is form] for form in Form}
    if shape.edits:
        followed = shape.questions > 0
        edit = draw.rng.choice([e for e in EDITS if not followed or (e.can_be_followed and e.form is Form.WORDS)])
        return edit, draw.rng.sample(by_form[edit.form], shape.questions)
    first = draw.rng.choice([q for q in QUESTIONS if len(by_form[q.form]) >= shape.questions])
    others = [question for question in by_form[first.form] if question is not first]
    return None, [first, *draw.rng.sample(others, shape.questions - 1)]


def _hop(composition: Composition, draw: Draw, split: str, hops: int, path: str, form: Form) -> str:
    """Hides the path behind pointer files, with decoys of the same form beside it. Returns how to speak of it."""
    target = path
    reads: list[str] = []
    for _ in range(hops):
        pointer = draw.path(Form.WORDS)
        composition.files[pointer] = f"{target}\n"
        reads.insert(0, f"cat {pointer}")
        target = pointer
    for _ in range(2 if form is not Form.FOLDER else 1):
        composition.files.update(draw.subject(form)[1])
    composition.commands += reads
    what = "folder" if form is Form.FOLDER else "file"
    phrase = draw.rng.choice(_HOP_PHRASES[split][hops])
    composition.sentences.append(phrase.format(pointer=target, what=what))
    composition.kinds.append("hop")
    return f"that {what}"


def _edit(composition: Composition, draw: Draw, split: str, edit: Edit, path: str, spoken: str) -> Step[Edit]:
    step = Step(edit, path, edit.choose(draw, composition.after, path))
    composition.after = edit.apply(composition.after, path, step.slots)
    _say(composition, step, step.phrase(draw, split, spoken))
    return step


def _ask(
    composition: Composition, draw: Draw, split: str, question: Question, path: str, spoken: str, after_edit: bool = False
) -> bool:
    """False when the files give the question no single right answer, or one that ignores the edit before it."""
    step = Step(question, path, question.choose(draw, composition.after, path))
    answer = question.answer(composition.after, path, step.slots)
    if answer is None:
        return False
    phrase = step.phrase(draw, split, spoken)
    if after_edit:
        if path in composition.files and answer == question.answer(composition.files, path, step.slots):
            return False  # the edit would not matter for the answer
        phrase = draw.rng.choice(_THEN[split]).format(phrase[0].lower() + phrase[1:])
    _say(composition, step, phrase)
    composition.answers.append(answer)
    return True


def _say(composition: Composition, step: Step[Any], phrase: str) -> None:
    kind: Kind = step.kind
    composition.sentences.append(phrase)
    composition.commands.append(step.command)
    composition.kinds.append(kind.name)
