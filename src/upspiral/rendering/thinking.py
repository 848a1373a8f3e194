"""The tags that models put around their thinking."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThinkingTags:
    """What opens and closes a thought at the beginning of an answer."""

    open: str = "<think>"
    close: str = "</think>"

    def opened_by(self, text: str) -> bool:
        """Whether the text leaves a thought open."""
        return text.rfind(self.open) > text.rfind(self.close)


THINK = ThinkingTags()
KNOWN_TAGS = (THINK, ThinkingTags("[THINK]", "[/THINK]"), ThinkingTags("<seed:think>", "</seed:think>"))


def tags_around(thought: str, text: str) -> ThinkingTags | None:
    """The tags that stand directly around a thought in a text; None: it is not there, or in no tags that we know."""
    before, found, after = text.partition(thought)
    if not found:
        return None
    fitting = (tags for tags in KNOWN_TAGS if _ends_with(before, tags.open) and after.lstrip().startswith(tags.close))
    return next(fitting, None)


def _ends_with(text: str, tag: str) -> bool:
    return text.rstrip().endswith(tag)
