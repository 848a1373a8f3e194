"""What the headers of known agents say about a request. Hints only: tokens are the truth.

Sources: Claude Code's gateway protocol (x-claude-code-*), Codex (session-id, thread-id, x-codex-turn-metadata),
opencode (x-session-id, x-parent-session-id), the Stainless SDKs of OpenAI and Anthropic (x-stainless-retry-count).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MOST_CHARACTERS = 200
"""Longer ids are cut: they are compared, never trusted."""


@dataclass(frozen=True, slots=True)
class Hints:
    """Everything an agent said beside the request's body; "" where it said nothing."""

    conversation: str = ""
    """Names one agent's conversation within the rollout: a main agent, a sub-agent, a thread."""
    parent: str = ""
    """The conversation that this one was started by."""
    purpose: str = ""
    """What the agent says that the request is for, such as "compaction"."""
    retry: int = 0
    """Above 0: the client sends the same request again because it got no answer."""
    body_digest: bytes = b""
    """Tells equal bodies for the same endpoint; b"" when the caller did not compute it."""


NO_HINTS = Hints()


def hints_of(headers: Mapping[str, str], body_digest: bytes = b"") -> Hints:
    """Reads lower-case header names. Never raises: what cannot be read is not a hint."""
    codex = _json_object(headers.get("x-codex-turn-metadata", ""))
    session = _first(headers, "x-claude-code-session-id", "session-id", "x-session-id")
    conversation = _first(headers, "x-claude-code-agent-id", "thread-id") or _text(codex, "thread_id") or session
    parent = _first(headers, "x-claude-code-parent-agent-id", "x-parent-session-id") or _text(codex, "parent_thread_id")
    if not parent and headers.get("x-claude-code-agent-id"):
        parent = session  # the main agent sends no agent id
    retries = [_count(headers.get(name, "")) for name in ("x-stainless-retry-count", "x-upspiral-retry")]
    return Hints(
        conversation=conversation[:_MOST_CHARACTERS],
        parent=parent[:_MOST_CHARACTERS],
        purpose=_text(codex, "request_kind")[:_MOST_CHARACTERS],
        retry=max(retries),
        body_digest=body_digest,
    )


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0


def _first(headers: Mapping[str, str], *names: str) -> str:
    return next((headers[name] for name in names if headers.get(name)), "")


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    return value if isinstance(value, str) else ""


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
