"""Token ids to text while they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"


class TextDecoder:
    """Incremental decoding that never splits a character.

    Invariant: everything `push` and `finish` returned, joined, equals decoding all ids at once. Text is held back while
    it ends in the middle of a UTF-8 sequence.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        # Ids already emitted, kept as context because some decoders treat the first token of a text differently.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with these ids; "" while a character is incomplete."""
        self._pending.extend(token_ids)
        text = self._pending_text()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def finish(self) -> str:
        """What is left; an incomplete character becomes U+FFFD."""
        text = self._pending_text()
        self._context, self._pending = self._pending, []
        return text

    def _pending_text(self) -> str:
        return self._decode([*self._context, *self._pending])[len(self._decode(self._context)) :]
