"""Responses that a rollout may come back to, by `previous_response_id`, by item reference, or to read them again.

A response of a socket that is not to be stored is remembered by the socket, and only its socket can go on from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from upspiral.errors import RequestError
from upspiral.gateway.dialects.base import RolloutDesk, WireRequest
from upspiral.gateway.dialects.fields import FieldError, choice_field, shown
from upspiral.gateway.dialects.memory import Memory
from upspiral.gateway.dialects.openai_responses.items import Item, read_call
from upspiral.gateway.echo import canonical_json
from upspiral.gateway.request import AnswerRequest
from upspiral.types import Message, ToolCall

_RESPONSE, _ITEM, _CALL = "response:", "item:", "call:"
"""Begin the keys under which they are remembered."""
_MOST_LISTED, _LISTED = 100, 20


class UnknownResponseError(FieldError):
    """No response of this rollout has this id."""

    status = 404
    code = "response_not_found"


class PreviousResponseError(UnknownResponseError):
    """`previous_response_id` names none."""

    code = "previous_response_not_found"


@dataclass(frozen=True, slots=True, eq=False)
class StoredResponse:
    body: Mapping[str, Any]
    inputs: Sequence[Item]
    """Everything it was answered from, responses before it included."""

    @property
    def items(self) -> list[Item]:
        """What a response that follows it starts from."""
        return [*self.inputs, *self.body["output"]]


@dataclass(frozen=True, slots=True, eq=False)
class Shelves:
    """Where a request finds the responses before it, and leaves its own."""

    rollout: Memory
    connection: Memory | None = None
    """Of the socket that the request came on."""

    def find(self, key: str) -> Any | None:
        found = None if self.connection is None else self.connection.find(key)
        return self.rollout.find(key) if found is None else found

    def leave(self, response: StoredResponse, request: AnswerRequest, *, store: bool) -> None:
        """Remembers a response, unless nobody could come back to it."""
        memory = self.rollout if store else self.connection
        if memory is not None:
            keep(memory, response, request)


def keep(memory: Memory, response: StoredResponse, request: AnswerRequest) -> None:
    for item in response.body["output"]:
        memory.keep(_ITEM + item["id"], item, 0)
    memory.keep(_RESPONSE + response.body["id"], response, _size_bytes(request))


def forget(memory: Memory, name: str) -> None:
    """No effect when nothing of that name is remembered."""
    response: StoredResponse | None = memory.find(_RESPONSE + name)
    if response is not None:
        for item in response.body["output"]:
            memory.forget(_ITEM + item["id"])
        memory.forget(_RESPONSE + name)


def keep_call(memory: Memory, call: ToolCall, item: Item) -> None:
    """Remembers what the model wrote, if its item does not say it: a custom tool has one text and local_shell a few
    fields, whatever arguments a model makes up."""
    echoed = canonical_json(read_call(item).arguments)
    if echoed != canonical_json(call.arguments):
        memory.keep(_CALL + call.id, (echoed, call.arguments), len(echoed) + len(call.arguments))


def as_written(memory: Memory, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with the calls as the model wrote them, where a client sent back what it got."""
    return tuple(
        replace(message, tool_calls=tuple(_as_written(memory, call) for call in message.tool_calls))
        if message.tool_calls
        else message
        for message in messages
    )


def _as_written(memory: Memory, call: ToolCall) -> ToolCall:
    echoed, written = memory.find(_CALL + call.id) or ("", "")
    return replace(call, arguments=written) if echoed and echoed == canonical_json(call.arguments) else call


def _size_bytes(request: AnswerRequest) -> int:
    """About what the items and tools of a request take in memory."""
    tools = sum(2000 + len(tool.description) for tool in request.tools)
    return tools + sum(_message_bytes(message) for message in request.messages)


def _message_bytes(message: Message) -> int:
    arguments = sum(len(call.arguments) for call in message.tool_calls)
    return 500 + len(message.text) + len(message.thinking or "") + arguments


def previous_items(shelves: Shelves, value: Any) -> list[Item]:
    """The items behind `previous_response_id`; [] without one."""
    if value is None:
        return []
    response = shelves.find(f"{_RESPONSE}{value}")
    if response is None:
        raise PreviousResponseError(
            "previous_response_id",
            f"= {shown(value)} names no stored response: it was made with store=false, by another rollout, or too long "
            "ago, or what followed it on its socket failed; send the whole input",
        )
    return response.items


def find_item(shelves: Shelves, item_id: str) -> Item | None:
    """An item that some stored response gave out."""
    return shelves.find(_ITEM + item_id)


def retrieve(wanted: WireRequest, desk: RolloutDesk) -> Mapping[str, Any]:
    if wanted.query.get("stream") == "true":
        raise FieldError("stream", "= true is not supported for a stored response; read it whole")
    return _stored(wanted, desk).body


def delete(wanted: WireRequest, desk: RolloutDesk) -> Mapping[str, Any]:
    body = _stored(wanted, desk).body
    forget(desk.memory, body["id"])
    return {"id": body["id"], "object": "response", "deleted": True}


def cancel(wanted: WireRequest, desk: RolloutDesk) -> Mapping[str, Any]:
    response = _stored(wanted, desk)
    raise RequestError(f"response {response.body['id']} is complete; only background responses can be cancelled")


def list_input_items(wanted: WireRequest, desk: RolloutDesk) -> Mapping[str, Any]:
    """A page of what a response was answered from, newest first unless `order` says otherwise."""
    items = [_shown_item(item, index) for index, item in enumerate(_stored(wanted, desk).inputs)]
    if choice_field(wanted.query, "order", ("asc", "desc")) != "asc":
        items.reverse()
    after = wanted.query.get("after")
    if after is not None:
        start = next((index + 1 for index, item in enumerate(items) if item["id"] == after), None)
        if start is None:
            raise FieldError("after", f"= {shown(after)} is no input item of this response")
        items = items[start:]
    limit = wanted.query.get("limit", str(_LISTED))
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:4]) <= _MOST_LISTED:
        raise FieldError("limit", f"must be an integer from 1 to {_MOST_LISTED}, not {shown(limit)}")
    page = items[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(items) > len(page)}


def _shown_item(item: Item, index: int) -> Item:
    """With the fields that clients may leave out of what they send."""
    shown_item = {"type": "message", "id": f"item_{index}", **item}
    if isinstance(shown_item.get("content"), str):
        kind = "output_text" if shown_item.get("role") == "assistant" else "input_text"
        shown_item["content"] = [{"type": kind, "text": shown_item["content"]}]
    return shown_item


def _stored(wanted: WireRequest, desk: RolloutDesk) -> StoredResponse:
    name = wanted.path["response_id"]
    response = desk.memory.find(_RESPONSE + name)
    if response is None:
        raise UnknownResponseError("response_id", f"= {shown(name)} names no stored response of this rollout")
    return response
