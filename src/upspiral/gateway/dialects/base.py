"""What a wire dialect is: a translation between one API's JSON and our own nouns.

A dialect reads a body into an Exchange, which holds the AnswerRequest and knows how to write the answer down, whole or
as events. Where its API also has connections of many requests, it gives each a Channel. It never sees a socket, a
session or the graph. The server gives it a RolloutDesk for what else it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from upspiral.gateway.call import Call
from upspiral.gateway.dialects.memory import Memory
from upspiral.gateway.generation import AnswerEvent
from upspiral.gateway.request import AnswerRequest

WireEvent = tuple[str, bytes]
"""One event of a stream: its name ("" where the dialect gives events no name) and its data."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer, for a dialect to put into its own shape."""

    status: int
    """HTTP status."""
    code: str
    """A stable short name, such as "context_length_exceeded"."""
    message: str
    field: str | None = None
    """The field of the request that is wrong."""
    request_id: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class RolloutDesk:
    """What a dialect may use while it serves one rollout."""

    model_name: str
    decode: Callable[[Sequence[int]], str]
    """Token ids to text, special tokens left out."""
    count: Callable[[AnswerRequest], int]
    """Tokens of the prompt that a request would be answered from."""
    memory: Memory = field(default_factory=Memory)
    """What dialects remember of this rollout between requests. Gone when the rollout is sealed."""
    readings: Memory = field(default_factory=lambda: Memory(most_entries=16))
    """What the newest requests of its conversations were read as."""


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A request that asks for something else than an answer."""

    body: Mapping[str, Any]
    """{} for a method without one."""
    path: Mapping[str, Any]
    """Parameters of the path."""
    query: Mapping[str, str]


class EventWriter(Protocol):
    """Writes one answer's stream. The order of calls is opening, event ..., then closing or failure."""

    def opening(self) -> list[WireEvent]:
        """Sent at once, before the first token is sampled."""
        ...

    def event(self, event: AnswerEvent) -> list[WireEvent]: ...

    def closing(self) -> list[WireEvent]:
        """After the call is committed."""
        ...

    def failure(self, failure: Failure) -> list[WireEvent]: ...


class Exchange(Protocol):
    """One request for an answer, read, and how its answer is written."""

    @property
    def request(self) -> AnswerRequest: ...

    @property
    def stream(self) -> bool: ...

    def body(self, call: Call, events: Sequence[AnswerEvent]) -> Mapping[str, Any]:
        """The whole answer of a call that is committed without error. `events` are all of the call's."""
        ...

    def writer(self, call: Call) -> EventWriter: ...


ReadExchange = Callable[[Mapping[str, Any], RolloutDesk], Exchange]
"""Raises RequestError naming the field that is wrong."""


class Channel(Protocol):
    """One client's connection that carries many requests, one after the other. What it remembers goes with it."""

    def read(self, body: Mapping[str, Any]) -> Exchange | Sequence[WireEvent]:
        """A request for an answer, or, where nothing is to be sampled, all there is to say. Raises RequestError naming
        the field that is wrong."""
        ...

    def headers(self, body: Mapping[str, Any]) -> Mapping[str, str]:
        """What a message says that a request of its own would say in headers, by lower-case name."""
        ...

    def failure(self, failure: Failure) -> WireEvent:
        """In place of the answer to a message."""
        ...

    def failed(self) -> None:
        """What was read last has no complete answer, whoever said so."""
        ...


OpenChannel = Callable[[RolloutDesk], Channel]


@dataclass(frozen=True, slots=True)
class Lookup:
    """An endpoint that answers without sampling."""

    method: str
    path: str
    reply: Callable[[WireRequest, RolloutDesk], Mapping[str, Any]]
    """Raises RequestError naming what is wrong."""


class Dialect(Protocol):
    """One wire API. A new one is a file, a test and a line in the registry."""

    @property
    def answers(self) -> Mapping[str, ReadExchange]:
        """Paths whose POST asks for an answer."""
        ...

    @property
    def lookups(self) -> Sequence[Lookup]: ...

    @property
    def channels(self) -> Mapping[str, OpenChannel]:
        """Paths that also take a connection for many requests."""
        ...

    @property
    def mark(self) -> str:
        """A header, in lower case, that only this dialect's clients send, to tell them apart on shared paths; "" for
        none."""
        ...

    @property
    def request_id_header(self) -> str: ...

    @property
    def keepalive(self) -> WireEvent | None:
        """Sent while the engine is silent; None: a comment, which clients skip."""
        ...

    def error(self, failure: Failure) -> Mapping[str, Any]:
        """The body of an error."""
        ...

    def model(self, model_id: str) -> Mapping[str, Any]:
        """The entry of one model."""
        ...

    def models(self, model_ids: Sequence[str]) -> Mapping[str, Any]:
        """The list of models."""
        ...
