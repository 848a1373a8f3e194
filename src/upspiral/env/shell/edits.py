"""The edits. Adding one is adding one entry to EDITS."""

from __future__ import annotations

from upspiral.env.shell.files import Draw, Files, from_lines, lines_of
from upspiral.env.shell.kind import Edit, Slots
from upspiral.env.shell.vocabulary import Form


def _old_and_new(draw: Draw, files: Files, path: str) -> Slots:
    return {"old": draw.rng.choice(lines_of(files, path)), "new": draw.word_not_in(files[path])}


def _new(draw: Draw, files: Files, path: str) -> Slots:
    return {"new": draw.word_not_in(files[path])}


def _word(draw: Draw, files: Files, path: str) -> Slots:
    return {"word": draw.rng.choice(lines_of(files, path))}


def _line_number(draw: Draw, files: Files, path: str) -> Slots:
    return {"number": str(draw.rng.randint(2, len(lines_of(files, path))))}


def _target(draw: Draw, files: Files, path: str) -> Slots:
    return {"target": draw.path_beside(path)}


def _word_and_target(draw: Draw, files: Files, path: str) -> Slots:
    return {**_word(draw, files, path), **_target(draw, files, path)}


def _key_and_value(draw: Draw, files: Files, path: str) -> Slots:
    key, value = draw.rng.choice(lines_of(files, path)).split("=")
    return {"key": key, "value": draw.word_not_in(value)}


def _with_lines(files: Files, path: str, lines: list[str]) -> Files:
    return {**files, path: from_lines(lines)}


def _replace(files: Files, path: str, slots: Slots) -> Files:
    lines = [slots["new"] if line == slots["old"] else line for line in lines_of(files, path)]
    return _with_lines(files, path, lines)


def _delete_line(files: Files, path: str, slots: Slots) -> Files:
    lines = lines_of(files, path)
    del lines[int(slots["number"]) - 1]
    return _with_lines(files, path, lines)


def _without(files: Files, path: str) -> Files:
    return {other: text for other, text in files.items() if other != path}


def _set(files: Files, path: str, slots: Slots) -> Files:
    key, value = slots["key"], slots["value"]
    lines = [f"{key}={value}" if line.startswith(f"{key}=") else line for line in lines_of(files, path)]
    return _with_lines(files, path, lines)


EDITS: tuple[Edit, ...] = (
    Edit(
        name="replace",
        form=Form.WORDS,
        command="sed -i s/{old}/{new}/ {path}",
        train=(
            "Replace {old} by {new} in {path}.",
            "In {path}, replace {old} with {new}.",
            "Change {old} to {new} in {path}.",
            "Edit {path}: {old} must become {new}.",
        ),
        heldout=("Change every {old} in {path} to {new}.", "Please replace {old} by {new} in the file {path}."),
        choose=_old_and_new,
        apply=_replace,
    ),
    Edit(
        name="append",
        form=Form.WORDS,
        command="echo {new} >> {path}",
        train=(
            "Append the line {new} to {path}.",
            "Add {new} at the end of {path}.",
            "Add a last line {new} to {path}.",
            "Append {new} to {path}.",
        ),
        heldout=("At the end of {path}, add {new}.", "Please append the line {new} to the file {path}."),
        choose=_new,
        apply=lambda files, path, slots: _with_lines(files, path, [*lines_of(files, path), slots["new"]]),
    ),
    Edit(
        name="delete_matches",
        form=Form.WORDS,
        command="sed -i /{word}/d {path}",
        train=(
            "Delete the lines with {word} from {path}.",
            "Remove every {word} line from {path}.",
            "Delete all {word} lines in {path}.",
            "Remove the lines of {path} that contain {word}.",
        ),
        heldout=("Please delete every line with {word} in {path}.", "From {path}, remove the lines with {word}."),
        choose=_word,
        apply=lambda files, path, slots: _with_lines(
            files, path, [line for line in lines_of(files, path) if line != slots["word"]]
        ),
    ),
    Edit(
        name="delete_line",
        form=Form.WORDS,
        command="sed -i {number}d {path}",
        train=(
            "Delete line {number} of {path}.",
            "Remove line {number} from {path}.",
            "In {path}, delete line {number}.",
            "Drop line number {number} of {path}.",
        ),
        heldout=("Please delete line number {number} in {path}.", "From {path}, remove line {number}."),
        choose=_line_number,
        apply=_delete_line,
    ),
    Edit(
        name="sort",
        form=Form.WORDS,
        command="sort -o {path} {path}",
        train=(
            "Sort the lines of {path} in place.",
            "Sort {path} in place.",
            "Put the lines of {path} in alphabetical order.",
            "Sort the file {path} alphabetically.",
        ),
        heldout=("Please sort the lines in {path} alphabetically.", "In {path}, put the lines in alphabetical order."),
        apply=lambda files, path, slots: _with_lines(files, path, sorted(lines_of(files, path))),
    ),
    Edit(
        name="copy",
        form=Form.WORDS,
        command="cp {path} {target}",
        train=(
            "Copy {path} to {target}.",
            "Make a copy of {path} called {target}.",
            "Copy the file {path} to {target}.",
            "Save a copy of {path} as {target}.",
        ),
        heldout=("Please copy the file {path} as {target}.", "Make {target} a copy of {path}."),
        choose=_target,
        apply=lambda files, path, slots: {**files, slots["target"]: files[path]},
    ),
    Edit(
        name="rename",
        form=Form.WORDS,
        command="mv {path} {target}",
        train=(
            "Rename {path} to {target}.",
            "Move {path} to {target}.",
            "Rename the file {path} to {target}.",
            "Change the name of {path} to {target}.",
        ),
        heldout=("Please rename the file {path} as {target}.", "Move the file {path}: it must be called {target}."),
        choose=_target,
        apply=lambda files, path, slots: {**_without(files, path), slots["target"]: files[path]},
    ),
    Edit(
        name="save_matches",
        form=Form.WORDS,
        command="grep {word} {path} > {target}",
        train=(
            "Write the {word} lines of {path} to {target}.",
            "Save the lines of {path} with {word} to {target}.",
            "Put the lines with {word} from {path} into {target}.",
            "Write every {word} line of {path} into {target}.",
        ),
        heldout=(
            "Please write the lines of {path} with {word} to {target}.",
            "Save every {word} line from {path} in {target}.",
        ),
        choose=_word_and_target,
        apply=lambda files, path, slots: _with_lines(
            files, slots["target"], [line for line in lines_of(files, path) if line == slots["word"]]
        ),
        can_be_followed=False,
    ),
    Edit(
        name="remove",
        form=Form.WORDS,
        command="rm {path}",
        train=("Remove the file {path}.", "Delete {path}.", "Delete the file {path}.", "Remove {path}."),
        heldout=("Please delete the file called {path}.", "The file {path} must be removed."),
        apply=lambda files, path, slots: _without(files, path),
        can_be_followed=False,
    ),
    Edit(
        name="set",
        form=Form.SETTINGS,
        command="sed -i s/{key}=.*/{key}={value}/ {path}",
        train=(
            "Set {key} to {value} in {path}.",
            "In {path}, set {key} to {value}.",
            "Change the setting {key} to {value} in {path}.",
            "Make {key} equal to {value} in {path}.",
        ),
        heldout=("Please change {key} to {value} in {path}.", "In {path}, make the setting {key} equal to {value}."),
        choose=_key_and_value,
        apply=_set,
    ),
)
