"""Which stored tokens a request continues.

Messages find candidates, tokens decide (DESIGN law 1). The deepest stored answer that the request repeats is the
anchor: up to its last token the prompt is what is stored, and only the messages after it are rendered. Where there is
no anchor, or its tokens cannot be extended, the whole prompt is rendered and hangs below the longest stored path that
has exactly its tokens. What then remains forks, with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import orjson
from numpy.typing import NDArray

from upspiral.errors import TailMismatch
from upspiral.gateway.echo import EchoKeys, MessageKey
from upspiral.rendering.renderer import Renderer, Segment
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import Message, Node, Role, ToolSpec


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt and where its tokens belong in the graph."""

    token_ids: NDArray[np.int32]
    """[T] the stored path and the new context, without what opens the answer's turn."""
    reused_tokens: int
    """How many of them are stored tokens up to the anchor."""
    anchor: int | None
    """The node that the segments hang below; None: they begin a tree."""
    segments: tuple[Segment, ...]
    keys: tuple[MessageKey, ...]
    """[segments]"""
    tools_key: bytes
    fork: str = ""
    """Why the request does not go on from what it repeats: "tools" (it offers others), "template" (the chat template
    renders the past differently) or "edited" (it holds an answer that was never given); "" when it does."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What an answer is recorded with."""

    message: Message
    delivered: bool = True
    auxiliary: str = ""
    is_retry: bool = False
    """The client says it asks again for want of an answer."""


class History:
    """The graph of one live rollout with what the messages of its nodes mean."""

    def __init__(self, rollout_id: str, renderer: Renderer, *, keeps_thinking: bool = True) -> None:
        """Without `keeps_thinking` the chat template decides whether thinking of earlier answers stays."""
        self.graph = TrajectoryGraph(rollout_id)
        self._renderer = renderer
        self._keeps_thinking = keeps_thinking
        self._echo = EchoKeys()
        self._last_tools = b""
        self._by_key: dict[tuple[int | None, MessageKey], list[int]] = {}
        """Parent and what a message means -> the nodes there, oldest first."""
        self._context_nodes: dict[tuple[int | None, Role, bytes], int] = {}
        """Parent, role and tokens -> the node there that nobody sampled."""
        self._answer_tools: dict[int, bytes] = {}
        """Tools that were offered, by answer node. Templates may put them anywhere in the prompt."""
        self._paths: dict[int, NDArray[np.int32]] = {}
        """Tokens up to the end of the newest answers, which is what requests continue."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Prompt:
        """Builds the prompt for a request. Changes nothing that a reader could see."""
        tools_key = _tools_key(tools)
        if tools_key != self._last_tools:
            self._echo.offered(tools)
            self._last_tools = tools_key
        keys = self._echo.of(messages)
        anchor, depth, tools_changed = self._find_anchor(messages, keys, tools_key)
        fork = "tools" if tools_changed else ""
        if anchor is not None:
            messages = self._with_thinking(anchor, messages)
            if self._keeps_thinking or not self._loses_thinking(anchor, messages):
                try:
                    return self._extended(anchor, messages[depth:], keys[depth:], tools_key)
                except TailMismatch:
                    pass
            fork = "template"
        return self._by_tokens(self._renderer.render(messages, tools), keys, tools_key, fork)

    def add_context(self, prompt: Prompt, start: str | None = None) -> tuple[int | None, list[Node]]:
        """Adds the nodes of a prompt that the graph does not have yet; `start` is the reason of the first of them where
        a conversation begins. Returns the last node's id and the new nodes."""
        parent, added = prompt.anchor, []
        for segment, key in zip(prompt.segments, prompt.keys, strict=True):
            node = self._equal_context(parent, segment.role, segment.token_ids)
            if node is None:
                reason = "append" if added else start or self._fork_reason(parent, prompt)
                node = self.graph.add(
                    parent, TokenRun.given(segment.token_ids), role=segment.role, reason=reason, message=segment.message
                )
                self._index(node, key)
                self._context_nodes[parent, segment.role, segment.token_ids.tobytes()] = node.id
                added.append(node)
            parent = node.id
        return parent, added

    def add_answer(self, parent: int | None, tokens: TokenRun, answered: Answered, prompt: Prompt) -> Node:
        """Adds an answer below the prompt's last node. A second answer to the same prompt is a sibling, or a retry."""
        again = "retry" if answered.is_retry else "sibling"
        reason = "root" if parent is None else again if self.answers_below(parent) else "append"
        node = self.graph.add(
            parent, tokens, role="assistant", reason=reason, message=answered.message,
            delivered=answered.delivered, auxiliary=answered.auxiliary,
        )  # fmt: skip
        self._index(node, self._echo.of([answered.message])[0])
        self._answer_tools[node.id] = prompt.tools_key
        self._keep_path(node, prompt)
        return node

    def answers_below(self, parent: int | None) -> list[Node]:
        """The answers that were given to the prompt that ends with a node."""
        return [node for node in self.graph.children(parent) if node.id in self._answer_tools]

    def begins_conversation(self, prompt: Prompt) -> bool:
        """Whether new nodes of the prompt start a line of conversation in which nothing was answered yet."""
        path = [] if prompt.anchor is None else self.graph.path(prompt.anchor)
        if any(node.id in self._answer_tools for node in path):
            return False
        parent = prompt.anchor
        for segment in prompt.segments:
            node = self._equal_context(parent, segment.role, segment.token_ids)
            if node is None:
                return True
            parent = node.id
        return False

    def _with_thinking(self, anchor: Node, messages: Sequence[Message]) -> list[Message]:
        """The messages with the thinking that was sampled, which many agents do not send back. Whether it stays in the
        prompt is for the policy to say, not for the agent."""
        path = self.graph.path(anchor.id)
        known = [node.message.thinking if node.message else None for node in path]
        filled = [replace(message, thinking=thought) for message, thought in zip(messages, known, strict=False)]
        return [*filled, *messages[len(filled) :]]

    def _loses_thinking(self, anchor: Node, messages: Sequence[Message]) -> bool:
        """Whether the chat template would drop a thought that stands in the stored tokens. An answer that an earlier
        fork rendered without its thinking has lost it already."""
        path = self.graph.path(anchor.id)[: self._renderer.thinking_kept_from(messages)]
        return any(node.id in self._answer_tools and node.message and node.message.thinking for node in path)

    def _extended(self, anchor: Node, tail: Sequence[Message], keys: Sequence[MessageKey], tools_key: bytes) -> Prompt:
        stored = self._path_ids(anchor.id)
        after = anchor.finish_reason or "cancelled"
        segments = self._renderer.render_tail(
            tail,
            after=after,
            stop_token=int(stored[-1]) if after == "stop" else None,
            calls=anchor.message.tool_calls if anchor.message else (),
        )
        edited = any(segment.role == "assistant" for segment in segments)
        return Prompt(
            token_ids=np.concatenate([stored, *(segment.token_ids for segment in segments)]),
            reused_tokens=len(stored),
            anchor=anchor.id,
            segments=tuple(segments),
            keys=tuple(keys),
            tools_key=tools_key,
            fork="edited" if edited else "",
        )

    def _by_tokens(
        self, segments: Sequence[Segment], keys: Sequence[MessageKey], tools_key: bytes, fork: str
    ) -> Prompt:
        """Hangs a whole prompt below the longest stored path with exactly its tokens."""
        anchor, stored, rest = self._stored_path(segments, keys)
        if not fork and anchor is not None and any(segment.role == "assistant" for segment in rest):
            fork = "edited"
        ids = np.concatenate([segment.token_ids for segment in segments])
        return Prompt(
            token_ids=ids,
            reused_tokens=len(ids) - sum(len(segment.token_ids) for segment in rest),
            anchor=anchor,
            segments=tuple(rest),
            keys=tuple(keys[stored:]),
            tools_key=tools_key,
            fork=fork,
        )

    def _stored_path(
        self, segments: Sequence[Segment], keys: Sequence[MessageKey]
    ) -> tuple[int | None, int, list[Segment]]:
        """The last node of the longest stored path that has the segments' tokens, how many segments it covers, and the
        segments that remain. An answer is stored up to its last sampled token; what the template writes behind it, to
        end the turn, goes to the segment after it."""
        parent, left_over = None, np.empty(0, np.int32)
        # The last message is what the model answers to: it keeps tokens of its own.
        for index, segment in enumerate(segments[:-1]):
            ids = np.concatenate([left_over, segment.token_ids])
            node = self._equal_answer(parent, ids, keys[index]) or self._equal_context(parent, segment.role, ids)
            if node is None:
                break
            parent, left_over = node.id, ids[len(node.token_ids) :]
        else:
            index = len(segments) - 1
        first = segments[index]
        joined = Segment(first.role, first.message, np.concatenate([left_over, first.token_ids]))
        return parent, index, [joined, *segments[index + 1 :]]

    def _equal_answer(self, parent: int | None, ids: NDArray[np.int32], key: MessageKey) -> Node | None:
        """An answer that says the same and whose tokens `ids` begin with; the newest that was delivered."""
        equal = [
            self.graph.nodes[node_id]
            for node_id in self._by_key.get((parent, key), ())
            if node_id in self._answer_tools
            and np.array_equal(self.graph.nodes[node_id].token_ids, ids[: len(self.graph.nodes[node_id].token_ids)])
        ]
        return max(equal, key=lambda node: (node.delivered, node.id), default=None)

    def _equal_context(self, parent: int | None, role: Role, ids: NDArray[np.int32]) -> Node | None:
        node_id = self._context_nodes.get((parent, role, ids.tobytes()))
        return None if node_id is None else self.graph.nodes[node_id]

    def _find_anchor(
        self, messages: Sequence[Message], keys: Sequence[MessageKey], tools_key: bytes
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
            for node_id in self._by_key.get((parent, keys[depth]), ()):
                node = self.graph.nodes[node_id]
                if not _same_thinking(node, messages[depth]):
                    continue
                offered = self._answer_tools.get(node_id)
                sampled = answers + (offered is not None)
                frontier.append((node_id, depth + 1, sampled))
                if offered == tools_key:
                    best = max(best or (0, 0, False, 0), (depth + 1, sampled, node.delivered, node_id))
                elif offered is not None:
                    tools_changed = True
        if best is None:
            return None, 0, tools_changed
        return self.graph.nodes[best[-1]], best[0], False

    def _fork_reason(self, parent: int | None, prompt: Prompt) -> str:
        if prompt.fork:
            return prompt.fork
        if parent is None:
            return "root"
        return "branch" if self.graph.children(parent) else "append"

    def _index(self, node: Node, key: MessageKey) -> None:
        self._by_key.setdefault((node.parent, key), []).append(node.id)

    def _path_ids(self, node_id: int) -> NDArray[np.int32]:
        stored = self._paths.get(node_id)
        return self.graph.path_ids(node_id) if stored is None else stored

    def _keep_path(self, node: Node, prompt: Prompt) -> None:
        """A request mostly continues the answer before it: its path is kept, so that it need not be gathered again."""
        if prompt.anchor is not None:
            self._paths.pop(prompt.anchor, None)
        self._paths[node.id] = np.concatenate([prompt.token_ids, node.token_ids])


def _same_thinking(node: Node, message: Message) -> bool:
    """An agent may drop the thinking of an answer, but not change it."""
    stored = node.message.thinking if node.message else None
    return not message.thinking or message.thinking.strip() == (stored or "").strip()


def _tools_key(tools: Sequence[ToolSpec]) -> bytes:
    entries = [[tool.name, tool.description, dict(tool.parameters)] for tool in tools]
    return orjson.dumps(entries, option=orjson.OPT_SORT_KEYS)
