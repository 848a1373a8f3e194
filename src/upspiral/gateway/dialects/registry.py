"""The wire dialects that the gateway speaks: one line each."""

from __future__ import annotations

from collections.abc import Mapping

from upspiral.gateway.dialects.anthropic_messages import AnthropicMessages
from upspiral.gateway.dialects.base import Dialect
from upspiral.gateway.dialects.openai_chat import OpenAIChat
from upspiral.gateway.dialects.openai_responses.dialect import OpenAIResponses

DIALECTS: tuple[Dialect, ...] = (OpenAIChat(), OpenAIResponses(), AnthropicMessages())
"""The first answers whoever cannot be told apart."""


def dialect_of(path: str, headers: Mapping[str, str]) -> Dialect:
    """Whose client sent a request: by its path, else by a header (names in lower case) that only one dialect's clients
    send."""
    for dialect in DIALECTS:
        if any(path.endswith(answer) or f"{answer}/" in path for answer in dialect.answers):
            return dialect
    return next((dialect for dialect in DIALECTS if dialect.mark and dialect.mark in headers), DIALECTS[0])
