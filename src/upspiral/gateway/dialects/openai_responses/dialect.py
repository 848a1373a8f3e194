"""The dialect itself: which requests there are, and how they are read.

What would change the answer and is not supported is refused; what concerns storage, caching, billing and safety has no
influence on sampling and is let through. `truncation` "auto" is let through too: a history that does not fit is
refused with both numbers, never cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from upspiral.gateway.dialects.base import Failure, Lookup, RolloutDesk, WireRequest
from upspiral.gateway.dialects.fields import (
    FieldError,
    choice_field,
    flag_field,
    list_field,
    number_field,
    object_field,
    optional_text,
    refuse_unsupported,
    text_list,
    whole_field,
)
from upspiral.gateway.dialects.memory import Memory
from upspiral.gateway.dialects.openai_responses import stored
from upspiral.gateway.dialects.openai_responses.answer import ResponsesExchange, ThinkingForm
from upspiral.gateway.dialects.openai_responses.channel import ResponsesChannel
from upspiral.gateway.dialects.openai_responses.compaction import PROMPT, CompactExchange
from upspiral.gateway.dialects.openai_responses.items import Item, input_items, read_messages
from upspiral.gateway.dialects.openai_responses.stored import Shelves
from upspiral.gateway.dialects.openai_responses.tools import OfferedTools, read_tool_choice, read_tools, shown_tools
from upspiral.gateway.dialects.openai_shapes import model_entry, model_list, openai_error
from upspiral.gateway.request import AnswerRequest, ToolChoice
from upspiral.types import Message

_PATH = "/v1/responses"
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "frequency_penalty": (0,),
    "moderation": (),
    "presence_penalty": (0,),
    "prompt": (),
    "top_logprobs": (0,),
}
"""Fields that we do not support, with the values that ask for nothing."""
_ENCRYPTED = "reasoning.encrypted_content"
_REPEATED: Mapping[str, Any] = {
    "previous_response_id": None,
    "instructions": None,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "service_tier": "default",
    "safety_identifier": None,
    "prompt_cache_key": None,
    "user": None,
}
"""What a response repeats of its request, and what it says where the request said nothing."""
_FIXED: Mapping[str, Any] = {
    "background": False,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "top_logprobs": 0,
    "truncation": "disabled",
}


class OpenAIResponses:
    """The dialect of /v1/responses. A socket there carries what POST does."""

    mark = ""
    request_id_header = "x-request-id"
    keepalive = None

    def __init__(self) -> None:
        self.answers = {_PATH: read_exchange, f"{_PATH}/compact": read_compaction}
        one = f"{_PATH}/{{response_id}}"
        self.lookups = (
            Lookup("POST", f"{_PATH}/input_tokens", count_input_tokens),
            Lookup("GET", _PATH, _refuse_get),
            Lookup("GET", one, stored.retrieve),
            Lookup("DELETE", one, stored.delete),
            Lookup("GET", f"{one}/input_items", stored.list_input_items),
            Lookup("POST", f"{one}/cancel", stored.cancel),
        )
        self.channels = {_PATH: partial(ResponsesChannel, read_exchange)}

    def error(self, failure: Failure) -> Mapping[str, Any]:
        return openai_error(failure)

    def model(self, model_id: str) -> Mapping[str, Any]:
        return model_entry(model_id)

    def models(self, model_ids: Sequence[str]) -> Mapping[str, Any]:
        return model_list(model_ids)


def read_exchange(body: Mapping[str, Any], desk: RolloutDesk, connection: Memory | None = None) -> ResponsesExchange:
    """`connection` is what a socket remembers. Raises RequestError naming the field that is wrong."""
    refuse_unsupported(body, _NEUTRAL)
    text = object_field(body, "text", "")
    refuse_unsupported(text, {"format": ({"type": "text"},)}, "text")
    choice_field(body, "truncation", ("auto", "disabled"))
    include = text_list(body, "include")
    if "message.output_text.logprobs" in include:
        raise FieldError("include", "= message.output_text.logprobs is not supported; chat completions have logprobs")
    reasoning = object_field(body, "reasoning", "")
    shelves = Shelves(desk.memory, connection)
    items, tools, request = _read(body, shelves)
    return ResponsesExchange(
        request=request,
        stream=flag_field(body, "stream", False),
        tools=tools,
        thinking=ThinkingForm(
            summary=bool(reasoning.get("summary") or reasoning.get("generate_summary")),
            encrypted=_ENCRYPTED in include,
        ),
        repeated=_repeated(body, text, reasoning),
        inputs=items,
        store=flag_field(body, "store", True),
        shelves=shelves,
        desk=desk,
    )


def read_compaction(body: Mapping[str, Any], desk: RolloutDesk) -> CompactExchange:
    if not optional_text(body, "model"):
        raise FieldError("model", "is missing")
    items, _, request = _read(body, Shelves(desk.memory))
    asked = replace(
        request,
        messages=(*request.messages, Message("user", PROMPT)),
        # The tools stay in the prompt, so that it goes on where the conversation was.
        tool_choice=ToolChoice("none"),
        max_tokens=None,
    )
    return CompactExchange(asked, items)


def count_input_tokens(wanted: WireRequest, desk: RolloutDesk) -> Mapping[str, Any]:
    """Exactly the prompt tokens that the same request would be answered from."""
    _, _, request = _read(wanted.body, Shelves(desk.memory))
    return {"object": "response.input_tokens", "input_tokens": desk.count(request)}


def _read(body: Mapping[str, Any], shelves: Shelves) -> tuple[list[Item], OfferedTools, AnswerRequest]:
    before = stored.previous_items(shelves, body.get("previous_response_id"))
    items = [*before, *input_items(body.get("input"))]
    messages = read_messages(
        items, optional_text(body, "instructions"), partial(stored.find_item, shelves), first=len(before)
    )
    only_taken_in = shelves.connection is not None and body.get("generate") is False
    if not items and not only_taken_in:
        raise FieldError("input", "must be a text or a list with at least one item")
    tools = read_tools(body)
    choice, offered = read_tool_choice(body, tools.specs)
    request = AnswerRequest(
        messages=stored.as_written(shelves.rollout, messages),
        tools=offered,
        tool_choice=choice,
        parallel_tool_calls=flag_field(body, "parallel_tool_calls", True),
        max_tokens=whole_field(body, "max_output_tokens", least=1),
        temperature=number_field(body, "temperature", least=0),
        top_p=number_field(body, "top_p", least=1e-6, most=1),
        model=optional_text(body, "model"),
    )
    return items, tools, request


def _repeated(body: Mapping[str, Any], text: Mapping[str, Any], reasoning: Mapping[str, Any]) -> Mapping[str, Any]:
    said = {key: body[key] if body.get(key) is not None else value for key, value in _REPEATED.items()}
    return {
        **said,
        **_FIXED,
        "tools": shown_tools(list_field(body, "tools", "")),
        "text": {"format": {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
    }


def _refuse_get(wanted: WireRequest, desk: RolloutDesk) -> Mapping[str, Any]:
    del wanted, desk
    raise FieldError("method", f"GET is for WebSockets, and this request upgrades to none; POST to {_PATH} instead")
