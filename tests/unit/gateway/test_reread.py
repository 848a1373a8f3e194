"""Reading only what is new gives what reading everything gives (DESIGN law 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upspiral.gateway.dialects.anthropic_messages import AnthropicMessages
from upspiral.gateway.dialects.base import RolloutDesk
from upspiral.gateway.dialects.fields import FieldError
from upspiral.gateway.dialects.openai_chat import OpenAIChat
from upspiral.types import Message

READERS = {**OpenAIChat().answers, **AnthropicMessages().answers}
TEXTS = st.sampled_from(["a", "ab", '"', "[", ",", "a,", "{}", "\u2028"])
PARTS = st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=2)
ENTRIES = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "assistant", "system", "developer"]),
    st.one_of(TEXTS, PARTS, st.just(1), st.just(True), st.just(1.0)),
)


def desk() -> RolloutDesk:
    return RolloutDesk("tiny", lambda ids: "", lambda request: 0)


def read(path: str, entries: list[Mapping[str, Any]], at: RolloutDesk) -> tuple[Message, ...] | str:
    body = {"messages": [*entries, {"role": "user", "content": "go on"}], "max_tokens": 9}
    try:
        return READERS[path](body, at).request.messages
    except FieldError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=5), st.data())
def test_what_was_read_before_changes_nothing(entries: list[Mapping[str, Any]], data: st.DataObject) -> None:
    """Histories that grow, are rewound and edited, and the same history on another path."""
    remembering = desk()
    for _ in range(6):
        path = data.draw(st.sampled_from(sorted(READERS)))
        kept = entries[: data.draw(st.integers(0, len(entries)))]
        entries = [*kept, *data.draw(st.lists(ENTRIES, max_size=2))]
        assert read(path, entries, remembering) == read(path, entries, desk())


@pytest.mark.parametrize("paths", [sorted(READERS), sorted(READERS, reverse=True)])
def test_dialects_of_one_rollout_read_for_themselves(paths: list[str]) -> None:
    """Parts of a text are paragraphs to one of them, and one text to the other."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    shared = desk()
    found = {path: read(path, [{"role": "user", "content": parts}], shared)[0] for path in paths}
    assert found["/v1/chat/completions"] == Message("user", "ab")
    assert found["/v1/messages"] == Message("user", "a\n\nb")
