"""What caused what between the trees of a rollout: spawn, join, compaction.

Content is the evidence: a conversation whose opening repeats an argument of a tool call was started by that call, one
that repeats an answer given before goes on from it as a summary, and a tool result that repeats the last answer of a
started conversation brings it home. Only where content says nothing, headers that name a parent or a purpose decide.

Agents ask for summaries in elements (<summary>...</summary>) and hand on what stands inside, with blank lines of their
own: texts are compared without white space, and a part of an answer between tags counts as much as the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from upspiral.gateway.hints import Hints
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.types import Edge, Message, Node

LEAST_QUOTE = 24
"""Characters that a repeated text has to have: shorter ones repeat by chance."""
_TAG = re.compile(r"</?[A-Za-z][\w-]{0,40}>")
COMPACTION = "compaction"
"""What Codex says the purpose of a request is that asks for a summary."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a new conversation came about. `kind` becomes the reason of its first node."""

    kind: Literal["spawn", "compaction"]
    source: int
    evidence: Literal["content", "header"]


class Lineage:
    """Of one rollout. Looks at committed nodes only."""

    def __init__(self, graph: TrajectoryGraph) -> None:
        self._graph = graph
        self._conversation_of: dict[int, str] = {}
        """Answer node -> what the agent called its conversation."""
        self._purpose_of: dict[int, str] = {}
        self._newest: dict[int, Node | None] = {}
        """First node of a spawned conversation -> its newest answer."""
        self._home: dict[int, int] = {}
        """Answer node -> the first node of its conversation, if that was spawned."""

    def start_of(self, opening: Sequence[Message], hints: Hints, anchor: int | None = None) -> Start | None:
        """How a conversation that begins with these messages, below the node `anchor`, came about; None: nobody in this
        rollout started it."""
        text = "\n".join(message.text for message in opening if message.role in ("system", "user"))
        quotes = [(length, start) for start, length in self._quotes(text)]
        if quotes:
            return max(quotes, key=lambda quote: (quote[0], quote[1].source))[1]
        return self._start_by_own_words(opening, anchor) or self._start_by_header(hints)

    def answered(self, node: Node, hints: Hints, continues: int | None) -> None:
        """Takes in a new answer. `continues` is the one that its request repeats last, which may stand in another
        tree."""
        home = self._home_of(node, continues)
        if home is not None:
            self._home[node.id] = home
            self._newest[home] = node
        self._conversation_of[node.id] = hints.conversation
        self._purpose_of[node.id] = hints.purpose

    def started(self, first: Node, start: Start) -> Edge:
        """The edge of a new conversation whose first node is now in the graph."""
        if start.kind == "spawn":
            self._newest[first.id] = None
        return Edge(start.kind, start.source, first.id, start.evidence)

    def joins(self, nodes: Sequence[Node], continues: int | None) -> list[Edge]:
        """Edges from spawned conversations to the new nodes of a prompt whose messages repeat their last answers."""
        results = [node for node in nodes if node.role in ("tool", "user")]
        if not results or not self._newest:
            return []
        here = self._home_of(nodes[0], continues)
        last = [node for first, node in sorted(self._newest.items()) if node is not None and first != here]
        return [Edge("join", said.id, node.id) for said in last for node in results if _repeats(_text(node), said)]

    def _quotes(self, text: str) -> Iterator[tuple[Start, int]]:
        """What the opening repeats of earlier answers, with how much of it."""
        plain = _plain(text)
        for node, message in self._answers():
            repeated = max((len(part) for part in _parts(message.text) if part in plain), default=0)
            if repeated:
                yield Start("compaction", node.id, "content"), repeated
            for call in message.tool_calls:
                longest = max((len(value) for value in _strings(call.arguments) if value in text), default=0)
                if longest:
                    yield Start("spawn", node.id, "content"), longest

    def _start_by_own_words(self, opening: Sequence[Message], anchor: int | None) -> Start | None:
        """An agent may hand a summary on as if the model had said it in the new conversation. Then it was given under
        another system prompt and to another question; a history that was only edited changes one of them at most."""
        system = opening[0].text if opening[0].role == "system" else self._system(anchor)
        told = {_plain(after.text): before.text for before, after in pairwise(opening) if after.role == "assistant"}
        for node, message in self._answers():
            question = told.get(_plain(message.text))
            if question is None or len(_plain(message.text)) < LEAST_QUOTE:
                continue
            asked = None if node.parent is None else self._graph.nodes[node.parent].message
            if self._system(node.id) != system and (asked is None or asked.text != question):
                return Start("compaction", node.id, "content")
        return None

    def _answers(self) -> Iterator[tuple[Node, Message]]:
        """What was answered so far, without side calls and without what an agent wrote in the model's name."""
        for node in self._graph.nodes:
            if node.message is not None and node.num_sampled and not node.auxiliary:
                yield node, node.message

    def _system(self, node_id: int | None) -> str:
        """The system prompt above a node."""
        first = None if node_id is None else self._graph.path(node_id)[0]
        return first.message.text if first is not None and first.role == "system" and first.message else ""

    def _start_by_header(self, hints: Hints) -> Start | None:
        newest = sorted(self._conversation_of, reverse=True)
        own = (node for node in newest if self._conversation_of[node] == hints.conversation)
        asked = next((node for node in own if self._purpose_of[node] == COMPACTION), None)
        if asked is not None and hints.purpose != COMPACTION:
            return Start("compaction", asked, "header")
        parent = next((node for node in newest if hints.parent and self._conversation_of[node] == hints.parent), None)
        return None if parent is None else Start("spawn", parent, "header")

    def _home_of(self, node: Node, continues: int | None) -> int | None:
        """The first node of the spawned conversation that a node belongs to; None: to one that nobody spawned."""
        current: int | None = node.id
        while current is not None and current not in self._conversation_of:
            if current in self._newest:
                return current
            current = self._graph.nodes[current].parent
        answer = continues if current is None else current
        return None if answer is None else self._home.get(answer)


def _plain(text: str) -> str:
    """The words of a text."""
    return " ".join(text.split())


def _parts(text: str) -> list[str]:
    """What an agent may hand on of an answer and is long enough to tell: all of it, and what stands between tags."""
    parts = {_plain(part) for part in (text, *_TAG.split(text))}
    return [part for part in parts if len(part) >= LEAST_QUOTE]


def _text(node: Node) -> str:
    return node.message.text if node.message else ""


def _repeats(text: str, answer: Node) -> bool:
    """Whether a text holds an answer; a short one must stand alone, because it may be anywhere by chance."""
    said = _text(answer).strip()
    if len(said) >= LEAST_QUOTE:
        return said in text
    return bool(said) and (said == text.strip() or f'"{said}"' in text or said in map(str.strip, text.splitlines()))


def _strings(arguments: str) -> list[str]:
    """The texts among a call's arguments that are long enough to tell."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return []
    values = value.values() if isinstance(value, dict) else []
    return [text.strip() for text in values if isinstance(text, str) and len(text.strip()) >= LEAST_QUOTE]
