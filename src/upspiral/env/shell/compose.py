"""Composes questions and edits into tasks that need one to four tool calls.

A shape says of how many parts. With hops or edits all questions are about one subject; otherwise each has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from upspiral.env.shell.files import Draw, Files
from upspiral.env.shell.kind import Edit, Kind, Question, Step
from upspiral.env.shell.repertoire import Repertoire, Shape
from upspiral.env.shell.vocabulary import BY_SPLIT, Form

DONE = "done"
"""The right answer to a task that asks for a change only."""

_ATTEMPTS = 200


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
        1: ("In {pointer} you find the path of a {what}.", "Look into {pointer}: there a {what} is named."),
        2: (
            "In {pointer} you find the path of a file with the path of a {what}.",
            "Look into {pointer}: it names a file, and that one names a {what}.",
        ),
    },
}

_THEN = {
    "train": ("Then: {}", "Then answer: {}", "After that: {}"),
    "heldout": ("Next, {}", "When that is finished: {}"),
}

_DONE_PHRASES = {
    "train": ("Reply done.", "Then reply done.", "Answer done."),
    "heldout": ("When that is done, reply done.", "Finish with the answer done."),
}

_JOIN_PHRASES = {
    "train": (
        "Reply with the {count} results separated by a space.",
        "Give all {count} answers separated by a space.",
        "Write the {count} answers with a space between.",
        "Answer with the {count} results, with a space between.",
    ),
    "heldout": (
        "Reply with all {count} answers, a space between them.",
        "Write the {count} results in this order, separated by a space.",
    ),
}

_COUNT_WORDS = {2: "two", 3: "three"}


@dataclass(slots=True)
class Composition:
    """A task in the making: what to say, what to type, and what is then true."""

    draw: Draw
    split: str
    files: dict[str, str] = field(default_factory=dict)
    after: Files = field(default_factory=dict)
    """The files as the oracle leaves them."""
    sentences: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    """Of the questions and edits, in order."""

    @property
    def instruction(self) -> str:
        return " ".join(self.sentences)

    def truth(self) -> dict[str, Any]:
        """For the verifier: the answer and the wanted files; for demonstrations: the commands."""
        return {"answer": " ".join(self.answers) or DONE, "commands": list(self.commands), "after": self._changes()}

    def _changes(self) -> dict[str, str | None]:
        """Every path that matters after an edit (None: gone). Empty when the task asks for no change."""
        if self.after == self.files:
            return {}
        return {path: self.after.get(path) for path in sorted({*self.files, *self.after})}

    def add_subject(self, form: Form) -> str:
        path, files = self.draw.subject(form)
        self.files.update(files)
        self.after = dict(self.files)
        return path

    def hide(self, path: str, form: Form, hops: int) -> str:
        """Hides a path behind pointer files, with decoys of the same form beside it. Returns how to speak of it."""
        target = path
        reads: list[str] = []
        for _ in range(hops):
            pointer = self.draw.path(Form.WORDS)
            self.files[pointer] = f"{target}\n"
            reads.insert(0, f"cat {pointer}")
            target = pointer
        for _ in range(1 if form is Form.FOLDER else 2):
            self.add_subject(form)
        self.after = dict(self.files)
        self.commands += reads
        what = "folder" if form is Form.FOLDER else "file"
        self._say_one_of(_HOP_PHRASES[self.split][hops], pointer=target, what=what)
        return f"that {what}"

    def change(self, edit: Edit, path: str, spoken: str) -> Step[Edit] | None:
        """None when the edit changes nothing or leaves an empty file."""
        step = Step(edit, path, edit.choose(self.draw, self.after, path))
        before, self.after = self.after, edit.apply(self.after, path, step.slots)
        if self.after == before or not all(self.after.values()):
            return None
        self._add(step, step.phrase(self.draw, self.split, spoken))
        return step

    def ask(self, question: Question, path: str, spoken: str, *, about_change: bool = False) -> bool:
        """False when the files give the question no single right answer, or one that the edit leaves as it was."""
        step = Step(question, path, question.choose(self.draw, self.after, path))
        answer = question.answer(self.after, path, step.slots)
        if answer is None:
            return False
        phrase = step.phrase(self.draw, self.split, spoken)
        if about_change:
            if path in self.files and answer == question.answer(self.files, path, step.slots):
                return False
            phrase = self.draw.rng.choice(_THEN[self.split]).format(phrase[0].lower() + phrase[1:])
        self.answers.append(answer)
        self._add(step, phrase)
        return True

    def say_how_to_reply(self) -> None:
        if not self.answers:
            self._say_one_of(_DONE_PHRASES[self.split])
        if len(self.answers) > 1:
            self._say_one_of(_JOIN_PHRASES[self.split], count=_COUNT_WORDS[len(self.answers)])

    def _say_one_of(self, phrases: Sequence[str], **slots: str) -> None:
        self.sentences.append(self.draw.rng.choice(phrases).format(**slots))

    def _add(self, step: Step[Any], phrase: str) -> None:
        kind: Kind = step.kind
        self.sentences.append(phrase)
        self.commands.append(step.command)
        self.kinds.append(kind.name)


def compose(rng: Random, split: str, shape: Shape, repertoire: Repertoire) -> Composition:
    """Draws until the files give every question a single right answer and the edit matters."""
    for _ in range(_ATTEMPTS):
        composition = Composition(Draw(rng, BY_SPLIT[split]), split)
        shared = shape.hops + shape.edits > 0
        complete = (_one_subject if shared else _many_subjects)(composition, shape, repertoire)
        if complete:
            composition.say_how_to_reply()
            return composition
    raise AssertionError(f"no task of shape {shape.name} in {_ATTEMPTS} attempts")


def _many_subjects(composition: Composition, shape: Shape, repertoire: Repertoire) -> bool:
    for question in composition.draw.rng.sample(repertoire.questions, shape.questions):
        path = composition.add_subject(question.form)
        if not composition.ask(question, path, spoken=path):
            return False
    return True


def _one_subject(composition: Composition, shape: Shape, repertoire: Repertoire) -> bool:
    edit, questions = repertoire.draw_kinds(composition.draw.rng, shape)
    form = edit.form if edit else questions[0].form
    path = composition.add_subject(form)
    spoken = composition.hide(path, form, shape.hops) if shape.hops else path
    if edit:
        step = composition.change(edit, path, spoken)
        if step is None:
            return False
        if step.result_path != path:
            path = spoken = step.result_path
    return all(
        composition.ask(question, path, spoken, about_change=edit is not None and i == 0)
        for i, question in enumerate(questions)
    )
