"""Draws the files of a task."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from upspiral.env.shell.vocabulary import Form, Vocabulary

Files = Mapping[str, str]
"""Path -> text of a workspace."""


_FOLDERS_KEPT = 4
"""So many folder names stay unused by files, for tasks that ask about folders."""


def lines_of(files: Files, path: str) -> list[str]:
    return files[path].splitlines()


def from_lines(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def files_in(files: Files, folder: str) -> dict[str, str]:
    """Name -> text of the files that lie directly in a folder."""
    prefix = f"{folder}/"
    return {path.removeprefix(prefix): text for path, text in files.items() if path.startswith(prefix)}


class Draw:
    """A source of chance for one task. It never gives the same file or folder name twice."""

    def __init__(self, rng: Random, vocabulary: Vocabulary):
        self.rng = rng
        self.vocabulary = vocabulary
        self._stems = rng.sample(vocabulary.stems, len(vocabulary.stems))
        self._folders = rng.sample(vocabulary.folders, len(vocabulary.folders))

    def path(self, form: Form) -> str:
        """A new file name for this form, in new folders."""
        depth = self.rng.choice(self.vocabulary.depths) if len(self._folders) > _FOLDERS_KEPT else 0
        folders = [self._folders.pop() for _ in range(depth)]
        name = f"{self._stems.pop()}.{self.rng.choice(self.vocabulary.extensions[form])}"
        return "/".join([*folders, name])

    def path_beside(self, path: str) -> str:
        """A new file name in the same folder with the same extension."""
        folder, slash, name = path.rpartition("/")
        return f"{folder}{slash}{self._stems.pop()}.{name.rpartition('.')[2]}"

    def word_not_in(self, text: str) -> str:
        present = set(text.split())
        return self.rng.choice([word for word in self.vocabulary.words if word not in present])

    def subject(self, form: Form) -> tuple[str, dict[str, str]]:
        """Something to ask about: its path, and the files that make it."""
        if form is Form.FOLDER:
            return self._folder()
        path = self.path(form)
        return path, {path: from_lines(self._lines(form))}

    def _lines(self, form: Form) -> list[str]:
        rng = self.rng
        words = rng.sample(self.vocabulary.words, 10)
        match form:
            case Form.WORDS:
                return rng.choices(words[: rng.randint(3, 6)], k=rng.randint(5, 12))
            case Form.PROSE:
                return [" ".join(rng.choices(words[:6], k=rng.randint(1, 4))) for _ in range(rng.randint(4, 8))]
            case Form.NUMBERS:
                return [str(number) for number in rng.sample(range(2, 100), rng.randint(5, 10))]
            case Form.TABLE:
                return [f"{word},{rng.randint(2, 99)}" for word in words[: rng.randint(4, 8)]]
            case Form.SETTINGS:
                keys = rng.sample(self.vocabulary.keys, rng.randint(3, 5))
                return [f"{key}={rng.choice([rng.choice(words), str(rng.randint(2, 99))])}" for key in keys]
            case Form.FOLDER:
                raise AssertionError("a folder has no lines")

    def _folder(self) -> tuple[str, dict[str, str]]:
        folder = self._folders.pop()
        extensions = self.rng.choices(self.vocabulary.extensions[Form.FOLDER], k=self.rng.randint(3, 8))
        stems = self.rng.sample(self.vocabulary.stems, len(extensions))
        words = self.rng.sample(self.vocabulary.words, 2 * len(extensions))
        texts = [
            from_lines(self.rng.choices(words[2 * i : 2 * i + 2], k=self.rng.randint(1, 5))) for i in range(len(stems))
        ]
        names = [f"{stem}.{extension}" for stem, extension in zip(stems, extensions, strict=True)]
        return folder, {f"{folder}/{name}": text for name, text in zip(names, texts, strict=True)}
