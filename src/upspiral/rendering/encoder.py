"""Text to token ids, with the special tokens of the template kept apart from what only looks like them.

A tool that prints `<|im_end|>` must not end its own turn. Before a template sees them, the first character of every
special token inside contents is replaced by a mark that the tokenizer does not know (a private-use character, so the
text keeps its length). The rendered text then holds special tokens of the template only. Afterwards the stretch between
two of them that holds a mark is encoded once more, spelled out and without special tokens. Without marks nothing is
done twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from tokenizers import Encoding, Tokenizer

from upspiral.errors import TemplateError
from upspiral.types import Message

_FIRST_MARK, _LAST_MARK = 0xF0000, 0xFFFFD
_GUARDED_ROLES = ("user", "tool")
"""Others write what the model, or whoever runs it, wants to be said."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and the character that each of them begins at."""

    ids: list[int]
    starts: list[int]


class Encoder:
    """The tokenizer of a model. `trust_contents` switches the guard off: special tokens are then recognised everywhere,
    as Hugging Face does."""

    def __init__(self, tokenizer: Tokenizer, *, trust_contents: bool = False) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.tokenizer = tokenizer
        self.special = {index: token.content for index, token in added.items() if token.special}
        """Special tokens by id."""
        # The longest first, because one may begin like another.
        texts = sorted((text for text in self.special.values() if text), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, texts))) if texts and not trust_contents else None

    @property
    def guards(self) -> bool:
        """Whether special tokens inside contents are kept from being recognised."""
        return self._special_text is not None and self._spells_out

    def guard(self, messages: Sequence[Message]) -> tuple[Sequence[Message], Mapping[str, str]]:
        """The messages with special tokens in contents marked, and what each mark stands for, if there are any."""
        pattern = self._special_text
        if pattern is None or not any(_is_guarded(message) and pattern.search(message.text) for message in messages):
            return messages, {}
        if not self._spells_out:
            return messages, {}
        marks = self._choose_marks(messages)
        guarded = [
            replace(message, text=pattern.sub(lambda found: marks[found[0][0]] + found[0][1:], message.text))
            if _is_guarded(message)
            else message
            for message in messages
        ]
        return guarded, {mark: first for first, mark in marks.items()}

    def ids(self, text: str) -> list[int]:
        """All special tokens recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, marks: Mapping[str, str] = {}) -> Encoded:
        """The ids of a rendered text. Raises TemplateError when the template did not let the marks through."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        if not marks:
            return Encoded(encoding.ids, [start for start, _ in encoding.offsets])
        if any(json.dumps(mark)[1:-1] in text for mark in marks):
            raise TemplateError("the chat template escapes characters of a content that holds special tokens")
        return self._spell_out(text, encoding, marks)

    def _spell_out(self, text: str, encoding: Encoding, marks: Mapping[str, str]) -> Encoded:
        ids: list[int] = []
        starts: list[int] = []
        first = begin = 0
        special = [index for index, token in enumerate(encoding.ids) if token in self.special]
        for index in [*special, len(encoding.ids)]:
            end = encoding.offsets[index][0] if index < len(encoding.ids) else len(text)
            stretch = text[begin:end]
            if any(mark in stretch for mark in marks):
                plain = self._without_special.encode(stretch.translate(_table(marks)), add_special_tokens=False)
                ids += plain.ids
                starts += [begin + start for start, _ in plain.offsets]
            else:
                ids += encoding.ids[first:index]
                starts += [start for start, _ in encoding.offsets[first:index]]
            if index < len(encoding.ids):
                ids.append(encoding.ids[index])
                starts.append(end)
                first, begin = index + 1, encoding.offsets[index][1]
        return Encoded(ids, starts)

    def _choose_marks(self, messages: Sequence[Message]) -> dict[str, str]:
        """A mark for each character that a special token begins with; none of them occurs in the messages."""
        used = set().union(*(set(message.text) for message in messages))
        free = (chr(code) for code in range(_FIRST_MARK, _LAST_MARK) if chr(code) not in used)
        return {first: next(free) for first in sorted({text[0] for text in self.special.values() if text})}

    @cached_property
    def _without_special(self) -> Tokenizer:
        """A second tokenizer, made when a content first holds a special token: threads cannot share the switch."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _spells_out(self) -> bool:
        """Whether a stretch encodes alone as it does between special tokens. Some tokenizers put a space before the
        first word of a text, and for those contents stay unguarded."""
        special = next(iter(self.special.values()))
        sample = " one\n<two> three"
        for begin in ("", "\n", "word"):
            between = self.ids(f"{special}{begin}{sample}{special}")[1:-1]
            if self._without_special.encode(begin + sample, add_special_tokens=False).ids != between:
                return False
        return True


def _is_guarded(message: Message) -> bool:
    return message.role in _GUARDED_ROLES


def _table(marks: Mapping[str, str]) -> dict[int, str]:
    return {ord(mark): first for mark, first in marks.items()}
