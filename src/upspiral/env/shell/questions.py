"""The questions. Adding one is adding one entry to QUESTIONS."""

from __future__ import annotations

from collections import Counter

from upspiral.env.shell.files import Draw, Files, files_in, lines_of
from upspiral.env.shell.kind import Question, Slots
from upspiral.env.shell.vocabulary import Form


def _word(draw: Draw, files: Files, path: str) -> Slots:
    return {"word": draw.rng.choice(files[path].split())}


def _line_number(draw: Draw, files: Files, path: str) -> Slots:
    return {"number": str(draw.rng.randint(2, len(lines_of(files, path))))}


def _row(draw: Draw, files: Files, path: str) -> Slots:
    return {"word": draw.rng.choice(lines_of(files, path)).split(",")[0]}


def _key(draw: Draw, files: Files, path: str) -> Slots:
    return {"key": draw.rng.choice(lines_of(files, path)).split("=")[0]}


def _extension(draw: Draw, files: Files, path: str) -> Slots:
    return {"extension": draw.rng.choice(sorted(files_in(files, path))).rpartition(".")[2]}


def _word_in_folder(draw: Draw, files: Files, path: str) -> Slots:
    return {"word": draw.rng.choice("".join(files_in(files, path).values()).split())}


def _only(candidates: list[str]) -> str | None:
    return candidates[0] if len(candidates) == 1 else None


def _most_common(files: Files, path: str, _slots: Slots) -> str | None:
    counts = Counter(lines_of(files, path))
    return _only([line for line, count in counts.items() if count == max(counts.values())])


def _line_number_of(files: Files, path: str, slots: Slots) -> str | None:
    return _only([str(i) for i, line in enumerate(lines_of(files, path), 1) if line == slots["word"]])


def _nth_line(files: Files, path: str, slots: Slots) -> str | None:
    lines, number = lines_of(files, path), int(slots["number"])
    return lines[number - 1] if number <= len(lines) else None


def _rows(files: Files, path: str) -> dict[str, int]:
    rows = (line.split(",") for line in lines_of(files, path))
    return {name: int(number) for name, number in rows}


def _top_row(files: Files, path: str, _slots: Slots) -> str | None:
    rows = _rows(files, path)
    return _only([name for name, number in rows.items() if number == max(rows.values())])


def _largest_file(files: Files, path: str, _slots: Slots) -> str | None:
    sizes = {name: len(text) for name, text in files_in(files, path).items()}
    return _only([name for name, size in sizes.items() if size == max(sizes.values())])


def _numbers(files: Files, path: str) -> list[int]:
    return [int(line) for line in lines_of(files, path)]


QUESTIONS: tuple[Question, ...] = (
    Question(
        name="count_lines",
        form=Form.WORDS,
        command="wc -l < {path}",
        train=(
            "How many lines does {path} have?",
            "Count the lines of {path}.",
            "How many lines are in {path}?",
            "Tell me the number of lines in {path}.",
        ),
        heldout=("What is the number of lines in {path}?", "Say how many lines {path} has."),
        answer=lambda files, path, slots: str(len(lines_of(files, path))),
    ),
    Question(
        name="count_matches",
        form=Form.WORDS,
        command="grep -c {word} {path}",
        train=(
            "How many lines of {path} contain {word}?",
            "Count the lines with {word} in {path}.",
            "How often does the line {word} occur in {path}?",
            "In {path}, how many lines have {word}?",
        ),
        heldout=("What is the number of lines with {word} in {path}?", "Say how many lines of {path} have {word}."),
        choose=_word,
        answer=lambda files, path, slots: str(lines_of(files, path).count(slots["word"])),
    ),
    Question(
        name="count_log_matches",
        form=Form.PROSE,
        command="grep -c {word} {path}",
        train=(
            "How many lines of {path} mention {word}?",
            "Count the lines of {path} that mention {word}.",
            "In how many lines of {path} is {word}?",
            "Number of lines in {path} with the word {word}?",
        ),
        heldout=(
            "What is the number of lines of {path} that mention {word}?",
            "Say how many lines in {path} mention {word}.",
        ),
        choose=_word,
        answer=lambda files, path, slots: str(sum(slots["word"] in line.split() for line in lines_of(files, path))),
    ),
    Question(
        name="count_words",
        form=Form.PROSE,
        command="wc -w < {path}",
        train=(
            "How many words are in {path}?",
            "Count the words of {path}.",
            "How many words does {path} have?",
            "Tell me the number of words in {path}.",
        ),
        heldout=("What is the number of words in {path}?", "Say how many words {path} has."),
        answer=lambda files, path, slots: str(len(files[path].split())),
    ),
    Question(
        name="first_line",
        form=Form.WORDS,
        command="head -n 1 {path}",
        train=(
            "What is the first line of {path}?",
            "Show the first line of {path}.",
            "How does {path} begin? Give its first line.",
            "Which line comes first in {path}?",
        ),
        heldout=("Tell me the first line of {path}.", "What does the first line of {path} say?"),
        answer=lambda files, path, slots: lines_of(files, path)[0],
    ),
    Question(
        name="last_line",
        form=Form.WORDS,
        command="tail -n 1 {path}",
        train=(
            "What is the last line of {path}?",
            "Show the last line of {path}.",
            "How does {path} end? Give its last line.",
            "Which line comes last in {path}?",
        ),
        heldout=("Tell me the last line of {path}.", "What does the last line of {path} say?"),
        answer=lambda files, path, slots: lines_of(files, path)[-1],
    ),
    Question(
        name="nth_line",
        form=Form.WORDS,
        command="sed -n {number}p {path}",
        train=(
            "What is line {number} of {path}?",
            "Show line {number} of {path}.",
            "What does line {number} of {path} say?",
            "Give me line number {number} of {path}.",
        ),
        heldout=("What is written on line {number} of {path}?", "Tell me line {number} of {path}."),
        choose=_line_number,
        answer=_nth_line,
    ),
    Question(
        name="line_number",
        form=Form.WORDS,
        command="grep -n {word} {path}",
        train=(
            "Which line number of {path} is {word}?",
            "Give the line number of {word} in {path}.",
            "At which line number does {path} have {word}?",
            "Find the line number of {word} in {path}.",
        ),
        heldout=("Say which line number {word} has in {path}.", "What is the line number of {word} in {path}?"),
        choose=_word,
        answer=_line_number_of,
    ),
    Question(
        name="first_sorted",
        form=Form.WORDS,
        command="sort {path} | head -n 1",
        train=(
            "Which line of {path} is first in alphabetical order?",
            "Sort {path}. Which line is first?",
            "What is the first line of {path} after sorting?",
            "In {path}, which word is alphabetically first?",
        ),
        heldout=(
            "In alphabetical order, which line of {path} is first?",
            "Say which line comes first after sorting {path}.",
        ),
        answer=lambda files, path, slots: min(lines_of(files, path)),
    ),
    Question(
        name="count_distinct",
        form=Form.WORDS,
        command="sort -u {path} | wc -l",
        train=(
            "How many distinct lines does {path} have?",
            "Count the different lines of {path}.",
            "How many different words are in {path}?",
            "Without repeats, how many lines are in {path}?",
        ),
        heldout=("What is the number of different lines in {path}?", "Say how many distinct lines are in {path}."),
        answer=lambda files, path, slots: str(len(set(lines_of(files, path)))),
    ),
    Question(
        name="most_common",
        form=Form.WORDS,
        command="sort {path} | uniq -c | sort -n | tail -n 1",
        train=(
            "Which line is most common in {path}?",
            "Which word occurs most often in {path}?",
            "What is the most frequent line of {path}?",
            "Find the line that {path} repeats most.",
        ),
        heldout=("What is the most common line of {path}?", "Say which line occurs most often in {path}."),
        answer=_most_common,
    ),
    Question(
        name="largest",
        form=Form.NUMBERS,
        command="sort -n {path} | tail -n 1",
        train=(
            "What is the largest number in {path}?",
            "Find the biggest number in {path}.",
            "Which number in {path} is the largest?",
            "Give me the maximum of {path}.",
        ),
        heldout=("Tell me the largest number of {path}.", "What is the biggest number in {path}?"),
        answer=lambda files, path, slots: str(max(_numbers(files, path))),
    ),
    Question(
        name="smallest",
        form=Form.NUMBERS,
        command="sort -n {path} | head -n 1",
        train=(
            "What is the smallest number in {path}?",
            "Find the lowest number in {path}.",
            "Which number in {path} is the smallest?",
            "Give me the minimum of {path}.",
        ),
        heldout=("Tell me the smallest number of {path}.", "What is the lowest number in {path}?"),
        answer=lambda files, path, slots: str(min(_numbers(files, path))),
    ),
    Question(
        name="sum",
        form=Form.NUMBERS,
        command="awk '{{s+=$1}} END {{print s}}' {path}",
        train=(
            "What is the sum of the numbers in {path}?",
            "Add up the numbers in {path}.",
            "Sum all numbers of {path}.",
            "What do the numbers in {path} add up to?",
        ),
        heldout=("What is the sum of all numbers in {path}?", "Tell me what the numbers in {path} add up to."),
        answer=lambda files, path, slots: str(sum(_numbers(files, path))),
    ),
    Question(
        name="column_sum",
        form=Form.TABLE,
        command="awk -F, '{{s+=$2}} END {{print s}}' {path}",
        train=(
            "What is the sum of column 2 of {path}?",
            "Add up column 2 of {path}.",
            "Sum the second column of {path}.",
            "What does column 2 of {path} add up to?",
        ),
        heldout=("What is the sum of the second column of {path}?", "Say what column 2 in {path} adds up to."),
        answer=lambda files, path, slots: str(sum(_rows(files, path).values())),
    ),
    Question(
        name="row_value",
        form=Form.TABLE,
        command="grep {word} {path} | cut -d, -f2",
        train=(
            "What is the value of {word} in {path}?",
            "Look up {word} in {path}. What is column 2?",
            "Which number does {path} give for {word}?",
            "In {path}, what number belongs to {word}?",
        ),
        heldout=("Say which value {word} has in {path}.", "What number belongs to {word} in {path}?"),
        choose=_row,
        answer=lambda files, path, slots: str(_rows(files, path)[slots["word"]]),
    ),
    Question(
        name="top_row",
        form=Form.TABLE,
        command="sort -t, -nk2 {path} | tail -n 1",
        train=(
            "Which name in {path} has the largest value?",
            "In {path}, which name has the highest number?",
            "Whose number is the largest in {path}?",
            "Find the name with the biggest value in {path}.",
        ),
        heldout=(
            "Say which name has the largest number in {path}.",
            "What is the name with the highest value in {path}?",
        ),
        answer=_top_row,
    ),
    Question(
        name="setting",
        form=Form.SETTINGS,
        command="grep {key} {path} | cut -d= -f2",
        train=(
            "What is {key} set to in {path}?",
            "Which {key} does {path} set?",
            "Find the setting {key} in {path}.",
            "In {path}, what is the value of the key {key}?",
        ),
        heldout=("Tell me what {key} is set to in {path}.", "What is the value of {key} in {path}?"),
        choose=_key,
        answer=lambda files, path, slots: next(
            line.split("=")[1] for line in lines_of(files, path) if line.startswith(f"{slots['key']}=")
        ),
    ),
    Question(
        name="count_files",
        form=Form.FOLDER,
        command="ls {path} | wc -l",
        train=(
            "How many files are in {path}?",
            "Count the files in {path}.",
            "How many files does {path} hold?",
            "Tell me the number of files in {path}.",
        ),
        heldout=("What is the number of files in {path}?", "Say how many files {path} has."),
        answer=lambda files, path, slots: str(len(files_in(files, path))),
    ),
    Question(
        name="count_extension",
        form=Form.FOLDER,
        command="ls {path} | grep -c {extension}",
        train=(
            "How many {extension} files are in {path}?",
            "Count the .{extension} files in {path}.",
            "How many files in {path} end in .{extension}?",
            "Tell me the number of .{extension} files in {path}.",
        ),
        heldout=("What is the number of {extension} files in {path}?", "Say how many .{extension} files {path} has."),
        choose=_extension,
        answer=lambda files, path, slots: str(
            sum(name.endswith(f".{slots['extension']}") for name in files_in(files, path))
        ),
    ),
    Question(
        name="file_with_word",
        form=Form.FOLDER,
        command="grep -l {word} {path}/*",
        train=(
            "Which file in {path} contains {word}? Give its path.",
            "Give the path of the file in {path} that has {word}.",
            "Find {word} in {path}. What is the path of the file?",
            "What is the path of the file with {word} in {path}?",
        ),
        heldout=(
            "Tell me the path of the file in {path} with {word}.",
            "Say which file in {path} has {word}: give its path.",
        ),
        choose=_word_in_folder,
        answer=lambda files, path, slots: _only(
            [f"{path}/{name}" for name, text in files_in(files, path).items() if slots["word"] in text.split()]
        ),
    ),
    Question(
        name="largest_file",
        form=Form.FOLDER,
        command="ls -S {path} | head -n 1",
        train=(
            "What is the name of the largest file in {path}?",
            "Name the biggest file in {path}.",
            "In {path}, what is the biggest file called?",
            "Give the name of the largest file in {path}.",
        ),
        heldout=("Tell me the name of the biggest file in {path}.", "What is the largest file in {path} called?"),
        answer=_largest_file,
    ),
)
