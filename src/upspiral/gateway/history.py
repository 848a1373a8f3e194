"""Which stored tokens a request continues.

Messages find candidates, tokens decide (DESIGN law 1). The deepest stored answer that the request repeats is the
anchor: up to its last token the prompt is what is stored, and only the messages after it are rendered. Context nodes
below the anchor are reused where their tokens are equal, and the rest forks with a reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upspiral.rendering.renderer import Renderer, Segment
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import Message, Node, ToolSpec

MessageKey = tuple[object, ...]
"""Equal for messages that mean the same, whatever JSON spacing, tool-call ids or thinking a client sent back."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt and where its tokens belong in the graph."""

    token_ids: NDArray[np.int32]
    """[T] what the engine gets, generation prompt included."""
    reused_tokens: int
    """How many of them are stored tokens up to the anchor."""
    anchor: int | None
    """The node that the segments hang below; None: they begin a tree."""
    segments: tuple[Segment, ...]
    keys: tuple[MessageKey, ...]
    """[segments]"""
    tools_key: str
    tools_changed: bool
    """The request repeats stored answers, but offers other tools."""


class History:
    """The graph of one live rollout with what the messages of its nodes mean."""

    def __init__(self, rollout_id: str, renderer: Renderer) -> None:
        self.graph = TrajectoryGraph(rollout_id)
        self._renderer = renderer
        self._keys: dict[int, MessageKey] = {}
        self._answer_tools: dict[int, str] = {}
        """Tools that were offered, by answer node. Templates may put them anywhere in the prompt."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Prompt:
        """Builds the prompt for a request. Changes nothing."""
        keys, tools_key = message_keys(messages), _tools_key(tools)
        anchor, depth, tools_changed = self._find_anchor(messages, keys, tools_key)
        if anchor is None:
            stored, segments = np.empty(0, np.int32), self._renderer.render(messages, tools)
        else:
            stored = self.graph.path_ids(anchor.id)
            segments = self._renderer.render_tail(messages[depth:], after=anchor.finish_reason or "cancelled")
        parts = [stored, *(segment.token_ids for segment in segments), self._renderer.generation_prompt]
        return Prompt(
            token_ids=np.concatenate(parts),
            reused_tokens=len(stored),
            anchor=None if anchor is None else anchor.id,
            segments=tuple(segments),
            keys=tuple(keys[depth:]),
            tools_key=tools_key,
            tools_changed=tools_changed,
        )

    def add_context(self, prompt: Prompt) -> tuple[int | None, list[Node]]:
        """Adds the nodes of a prompt that the graph does not have yet. Returns the last node's id and the new nodes."""
        parent, added = prompt.anchor, []
        for segment, key in zip(prompt.segments, prompt.keys, strict=True):
            node = self._equal_child(parent, segment)
            if node is None:
                reason = self._context_reason(parent, prompt, first=not added)
                node = self.graph.add(
                    parent, TokenRun.given(segment.token_ids), role=segment.role, reason=reason, message=segment.message
                )
                self._keys[node.id] = key
                added.append(node)
            parent = node.id
        return parent, added

    def add_answer(
        self, parent: int | None, tokens: TokenRun, message: Message, prompt: Prompt, *, delivered: bool
    ) -> Node:
        """Adds an answer below the prompt's last node. A second answer to the same prompt is a sibling."""
        reason = "root" if parent is None else "sibling" if self.graph.children(parent) else "append"
        node = self.graph.add(parent, tokens, role="assistant", reason=reason, message=message, delivered=delivered)
        self._keys[node.id] = message_keys([message])[0]
        self._answer_tools[node.id] = prompt.tools_key
        return node

    def _find_anchor(
        self, messages: Sequence[Message], keys: Sequence[MessageKey], tools_key: str
    ) -> tuple[Node | None, int, bool]:
        """The deepest answer that the messages repeat with the same tools, how many messages its path covers, and
        whether only other tools stand in the way. Of equals, the path with more answers as they were sampled wins (an
        agent may have written what the model later says), then a delivered one, then the newest."""
        best: tuple[int, int, bool, int] | None = None
        tools_changed = False
        frontier: list[tuple[int | None, int, int]] = [(None, 0, 0)]
        while frontier:
            parent, depth, answers = frontier.pop()
            # The last message is what the model answers to; it is always rendered.
            if depth >= len(messages) - 1:
                continue
            for node in self.graph.children(parent):
                if not self._repeats(node, messages[depth], keys[depth]):
                    continue
                offered = self._answer_tools.get(node.id)
                sampled = answers + (offered is not None)
                frontier.append((node.id, depth + 1, sampled))
                if offered == tools_key:
                    best = max(best or (0, 0, False, 0), (depth + 1, sampled, node.delivered, node.id))
                elif offered is not None:
                    tools_changed = True
        if best is None:
            return None, 0, tools_changed
        return self.graph.nodes[best[-1]], best[0], False

    def _repeats(self, node: Node, message: Message, key: MessageKey) -> bool:
        if self._keys[node.id] != key:
            return False
        stored = node.message.thinking if node.message else None
        return not message.thinking or message.thinking == stored

    def _equal_child(self, parent: int | None, segment: Segment) -> Node | None:
        for node in self.graph.children(parent):
            is_context = node.id not in self._answer_tools
            if is_context and node.role == segment.role and np.array_equal(node.token_ids, segment.token_ids):
                return node
        return None

    def _context_reason(self, parent: int | None, prompt: Prompt, *, first: bool) -> str:
        if first and prompt.tools_changed:
            return "tools"
        if parent is None:
            return "root"
        return "edited" if self.graph.children(parent) else "append"


def message_keys(messages: Sequence[Message]) -> list[MessageKey]:
    """One key per message. A tool result is tied to its call by the call's position, because clients rename ids."""
    keys: list[MessageKey] = []
    call_ids: list[str] = []
    for message in messages:
        if message.role == "assistant":
            call_ids = [call.id for call in message.tool_calls]
        position = call_ids.index(message.tool_call_id) if message.tool_call_id in call_ids else None
        calls = tuple((call.name, canonical_json(call.arguments)) for call in message.tool_calls)
        keys.append((message.role, message.text, calls, position))
    return keys


def canonical_json(text: str) -> str:
    """The same text for JSON that differs only in spacing, escapes or key order; other text unchanged."""
    try:
        return json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    except ValueError:
        return text


def _tools_key(tools: Sequence[ToolSpec]) -> str:
    entries = [[tool.name, tool.description, dict(tool.parameters)] for tool in tools]
    return json.dumps(entries, sort_keys=True, default=str)
