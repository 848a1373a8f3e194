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
from upspiral.gateway.echo import MessageKey
from upspiral.gateway.line import Line, LineId, Lines
from upspiral.rendering.renderer import Renderer, Segment
from upspiral.trajectory.graph import TokenRun, TrajectoryGraph
from upspiral.types import Message, Node, Role, ToolSpec

_PATHS_KEPT = 16
"""A rollout has that many conversations at a time, or their paths are gathered from the nodes again."""


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
    line: Line
    """The request's messages."""
    tools_key: bytes
    continues: int | None = None
    """The last answer that the request repeats, whether or not its tokens could be gone on from."""
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


@dataclass(frozen=True, slots=True)
class _Given:
    """What an answer node was given for."""

    key: MessageKey
    tools_key: bytes
    """Tools that were offered. Templates may put them anywhere in the prompt."""
    sampled: int
    """Answers on its path as they were sampled, itself included. An agent may have written the others."""


class History:
    """The graph of one live rollout with what the messages of its nodes mean."""

    def __init__(self, rollout_id: str, renderer: Renderer, *, keeps_thinking: bool = True) -> None:
        """Without `keeps_thinking` the chat template decides whether thinking of earlier answers stays."""
        self.graph = TrajectoryGraph(rollout_id)
        self._renderer = renderer
        self._keeps_thinking = keeps_thinking
        self._lines = Lines()
        self._last_tools = b""
        self._at_line: dict[LineId, list[int]] = {}
        """By the line of conversation: the answers that end it, oldest first."""
        self._context_nodes: dict[tuple[int | None, Role, bytes], int] = {}
        """Parent, role and tokens -> the node there that nobody sampled."""
        self._given: dict[int, _Given] = {}
        """By answer node."""
        self._paths: dict[int, NDArray[np.int32]] = {}
        """Tokens up to the end of the newest answers, oldest first: they are what requests continue."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Prompt:
        """Builds the prompt for a request. Changes nothing that a reader could see."""
        tools_key = _tools_key(tools)
        if tools_key != self._last_tools:
            self._lines.offered(tools)
            self._last_tools = tools_key
        line = self._lines.follow(messages)
        anchor, depth, other = self._find_anchor(line, tools_key)
        prompt = None if anchor is None else self._extended(anchor, messages, depth, line, tools_key)
        if prompt is None:
            known = messages if anchor is None else self._with_thinking(anchor, messages)
            prompt = self._by_tokens(self._renderer.render(known, tools), line, tools_key)
        if other is not None:
            return replace(prompt, fork="tools", continues=other.id)
        if anchor is None:
            return prompt
        changed = prompt.anchor != anchor.id and not self._goes_on(prompt, anchor)
        return replace(prompt, fork="template" if changed else prompt.fork, continues=anchor.id)

    def add_context(
        self, prompt: Prompt, start: str | None = None, routes: NDArray[np.int16] | None = None
    ) -> tuple[int | None, list[Node]]:
        """Adds the nodes of a prompt that the graph does not have yet; `start` is the reason of the first of them where
        a conversation begins, `routes` those of the whole prompt. Returns the last node's id and the new nodes."""
        parent, added = prompt.anchor, []
        for segment in prompt.segments:
            begin = 0 if parent is None else self.graph.length(parent)
            own_routes = None if routes is None else routes[begin : begin + len(segment.token_ids)]
            node = self._equal_context(parent, segment.role, segment.token_ids)
            if node is None:
                reason = "append" if added else start or self._fork_reason(parent, prompt)
                node = self.graph.add(
                    parent, TokenRun.given(segment.token_ids, own_routes), role=segment.role, reason=reason,
                    message=segment.message,
                )  # fmt: skip
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
        key, line = prompt.line.going_on(answered.message)
        last = self._last_answer(parent)
        before = 0 if last is None else self._given[last].sampled
        self._given[node.id] = _Given(key, prompt.tools_key, before + 1)
        self._at_line.setdefault(line, []).append(node.id)
        self._keep_path(node, prompt)
        return node

    def answers_below(self, parent: int | None) -> list[Node]:
        """The answers that were given to the prompt that ends with a node."""
        return [node for node in self.graph.children(parent) if node.id in self._given]

    def begins_conversation(self, prompt: Prompt) -> bool:
        """Whether new nodes of the prompt start a line of conversation in which nothing was answered yet. One that goes
        on in a tree of its own, with other tools or as the template has it, was begun before."""
        if prompt.continues is not None or self._last_answer(prompt.anchor) is not None:
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
        filled = [
            message if message.thinking == thought else replace(message, thinking=thought)
            for message, thought in zip(messages, known, strict=False)
        ]
        return [*filled, *messages[len(filled) :]]

    def _loses_thinking(self, anchor: Node, messages: Sequence[Message]) -> bool:
        """Whether the chat template would drop a thought that stands in the stored tokens. An answer that an earlier
        fork rendered without its thinking has lost it already."""
        kept_from = self._renderer.thinking_kept_from(self._with_thinking(anchor, messages))
        path = self.graph.path(anchor.id)[:kept_from]
        return any(node.id in self._given and node.message and node.message.thinking for node in path)

    def _extended(
        self, anchor: Node, messages: Sequence[Message], depth: int, line: Line, tools_key: bytes
    ) -> Prompt | None:
        """The prompt that goes on from an answer's stored tokens, which end `depth` messages; None where it must be
        rendered whole."""
        if not self._keeps_thinking and self._loses_thinking(anchor, messages):
            return None
        stored = self._path_ids(anchor.id)
        after = anchor.finish_reason or "cancelled"
        try:
            segments = self._renderer.render_tail(
                messages[depth:],
                after=after,
                stop_token=int(stored[-1]) if after == "stop" else None,
                calls=anchor.message.tool_calls if anchor.message else (),
            )
        except TailMismatch:
            return None
        edited = any(segment.role == "assistant" for segment in segments)
        return Prompt(
            token_ids=np.concatenate([stored, *(segment.token_ids for segment in segments)]),
            reused_tokens=len(stored),
            anchor=anchor.id,
            segments=tuple(segments),
            line=line,
            tools_key=tools_key,
            fork="edited" if edited else "",
        )

    def _by_tokens(self, segments: Sequence[Segment], line: Line, tools_key: bytes) -> Prompt:
        """Hangs a whole prompt below the longest stored path with exactly its tokens."""
        anchor, rest = self._stored_path(segments, line.keys)
        edited = anchor is not None and any(segment.role == "assistant" for segment in rest)
        ids = np.concatenate([segment.token_ids for segment in segments])
        return Prompt(
            token_ids=ids,
            reused_tokens=len(ids) - sum(len(segment.token_ids) for segment in rest),
            anchor=anchor,
            segments=tuple(rest),
            line=line,
            tools_key=tools_key,
            fork="edited" if edited else "",
        )

    def _goes_on(self, prompt: Prompt, answer: Node) -> bool:
        """Whether a prompt that was rendered whole has the stored tokens up to the end of an answer all the same."""
        stored = self._path_ids(answer.id)
        return np.array_equal(prompt.token_ids[: len(stored)], stored)

    def _stored_path(self, segments: Sequence[Segment], keys: Sequence[MessageKey]) -> tuple[int | None, list[Segment]]:
        """The last node of the longest stored path that has the segments' tokens, and the segments that remain. An
        answer is stored up to its last sampled token; what the template writes behind it, to end the turn, goes to the
        segment after it."""
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
        return parent, [joined, *segments[index + 1 :]]

    def _equal_answer(self, parent: int | None, ids: NDArray[np.int32], key: MessageKey) -> Node | None:
        """An answer that says the same and whose tokens `ids` begin with; the newest that was delivered."""
        equal = [
            node
            for node in self.answers_below(parent)
            if self._given[node.id].key == key and np.array_equal(node.token_ids, ids[: len(node.token_ids)])
        ]
        return max(equal, key=lambda node: (node.delivered, node.id), default=None)

    def _equal_context(self, parent: int | None, role: Role, ids: NDArray[np.int32]) -> Node | None:
        node_id = self._context_nodes.get((parent, role, ids.tobytes()))
        return None if node_id is None else self.graph.nodes[node_id]

    def _find_anchor(self, line: Line, tools_key: bytes) -> tuple[Node | None, int, Node | None]:
        """The deepest answer that the messages repeat with the same tools, how many messages its path covers, and the
        deepest one below it, if any, that was given with other tools. Of equals, the path with more answers as they
        were sampled wins (an agent may have written what the model later says), then a delivered one, then the
        newest."""
        other: Node | None = None
        # The last message is what the model answers to; it is always rendered.
        for depth in range(len(line.messages) - 1, 0, -1):
            repeated = [node for node in self._ending(line.ids[depth - 1]) if self._same_thoughts(node, line)]
            usable = [node for node in repeated if self._given[node.id].tools_key == tools_key]
            if usable:
                return max(usable, key=self._worth), depth, other
            other = other or max(repeated, key=self._worth, default=None)
        return None, 0, other

    def _ending(self, line: LineId) -> list[Node]:
        """The answers that end a line of conversation."""
        return [self.graph.nodes[node_id] for node_id in self._at_line.get(line, ())]

    def _worth(self, answer: Node) -> tuple[int, bool, int]:
        return self._given[answer.id].sampled, answer.delivered, answer.id

    def _same_thoughts(self, answer: Node, line: Line) -> bool:
        """An agent may drop the thinking of an answer, but not change it."""
        if not line.thoughts:
            return True
        path = [node.message.thinking if node.message else None for node in self.graph.path(answer.id)]
        return all(
            thought.strip() == (path[index] or "").strip() for index, thought in line.thoughts if index < len(path)
        )

    def _last_answer(self, node_id: int | None) -> int | None:
        """The answer that stands last on the path to a node, which may be that node; None: nothing was answered yet."""
        while node_id is not None and node_id not in self._given:
            node_id = self.graph.nodes[node_id].parent
        return node_id

    def _fork_reason(self, parent: int | None, prompt: Prompt) -> str:
        if prompt.fork:
            return prompt.fork
        if parent is None:
            return "root"
        return "branch" if self.graph.children(parent) else "append"

    def _path_ids(self, node_id: int) -> NDArray[np.int32]:
        stored = self._paths.get(node_id)
        return self.graph.path_ids(node_id) if stored is None else stored

    def _keep_path(self, node: Node, prompt: Prompt) -> None:
        """A request mostly continues the answer before it: its path is kept, so that it need not be gathered again."""
        if prompt.anchor is not None:
            self._paths.pop(prompt.anchor, None)
        self._paths[node.id] = np.concatenate([prompt.token_ids, node.token_ids])
        if len(self._paths) > _PATHS_KEPT:
            del self._paths[next(iter(self._paths))]


def _tools_key(tools: Sequence[ToolSpec]) -> bytes:
    entries = [[tool.name, tool.description, dict(tool.parameters)] for tool in tools]
    return orjson.dumps(entries, option=orjson.OPT_SORT_KEYS)
