"""What the specification of Open Responses asks of responses, items and events, as its JSON schemas have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.fixtures.wire_client import StreamEvent

NULLABLE = (type(None),)
RESOURCE: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "object": (str,),
    "created_at": (int,),
    "completed_at": (int, *NULLABLE),
    "status": (str,),
    "incomplete_details": (dict, *NULLABLE),
    "model": (str,),
    "previous_response_id": (str, *NULLABLE),
    "instructions": (str, *NULLABLE),
    "output": (list,),
    "error": (dict, *NULLABLE),
    "tools": (list,),
    "tool_choice": (str, dict),
    "truncation": (str,),
    "parallel_tool_calls": (bool,),
    "text": (dict,),
    "top_p": (int, float),
    "presence_penalty": (int, float),
    "frequency_penalty": (int, float),
    "top_logprobs": (int,),
    "temperature": (int, float),
    "reasoning": (dict, *NULLABLE),
    "usage": (dict, *NULLABLE),
    "max_output_tokens": (int, *NULLABLE),
    "max_tool_calls": (int, *NULLABLE),
    "store": (bool,),
    "background": (bool,),
    "service_tier": (str,),
    "metadata": (dict,),
    "safety_identifier": (str, *NULLABLE),
    "prompt_cache_key": (str, *NULLABLE),
}
"""The required fields of the response object."""
ITEMS: dict[str, dict[str, tuple[type, ...]]] = {
    "message": {"id": (str,), "status": (str,), "role": (str,), "content": (list,)},
    "function_call": {"id": (str,), "call_id": (str,), "name": (str,), "arguments": (str,), "status": (str,)},
    "reasoning": {"id": (str,), "summary": (list,)},
    "compaction": {"id": (str,), "encrypted_content": (str,)},
}
EVENTS: dict[str, dict[str, tuple[type, ...]]] = {
    "response.created": {"response": (dict,)},
    "response.in_progress": {"response": (dict,)},
    "response.completed": {"response": (dict,)},
    "response.incomplete": {"response": (dict,)},
    "response.failed": {"response": (dict,)},
    "response.output_item.added": {"output_index": (int,), "item": (dict,)},
    "response.output_item.done": {"output_index": (int,), "item": (dict,)},
    "response.content_part.added": {
        "item_id": (str,),
        "output_index": (int,),
        "content_index": (int,),
        "part": (dict,),
    },
    "response.content_part.done": {"item_id": (str,), "output_index": (int,), "content_index": (int,), "part": (dict,)},
    "response.output_text.delta": {"item_id": (str,), "output_index": (int,), "content_index": (int,), "delta": (str,)},
    "response.output_text.done": {"item_id": (str,), "output_index": (int,), "content_index": (int,), "text": (str,)},
    "response.function_call_arguments.delta": {"item_id": (str,), "output_index": (int,), "delta": (str,)},
    "response.function_call_arguments.done": {"item_id": (str,), "output_index": (int,), "arguments": (str,)},
}


def check_fields(value: Any, fields: dict[str, tuple[type, ...]]) -> None:
    for name, kinds in fields.items():
        assert name in value, f"{name} is missing in {value}"
        assert type(value[name]) in kinds, f"{name} is {value[name]!r}"


def check_items(items: list[Any]) -> None:
    for item in items:
        check_fields(item, ITEMS[item["type"]])
        for part in item.get("content", []):
            if part["type"] == "output_text":
                check_fields(part, {"text": (str,), "annotations": (list,), "logprobs": (list,)})


def check_resource(response: Any) -> None:
    check_fields(response, RESOURCE)
    assert response["object"] == "response"
    check_items(response["output"])
    for tool in response["tools"]:
        assert {"type", "name", "description", "parameters", "strict"} <= set(tool)
    if response["usage"] is not None:
        check_usage(response["usage"])


def check_usage(usage: Any) -> None:
    check_fields(usage, {"input_tokens": (int,), "output_tokens": (int,), "total_tokens": (int,)})
    assert type(usage["input_tokens_details"]["cached_tokens"]) is int
    assert type(usage["output_tokens_details"]["reasoning_tokens"]) is int


def check_completed(response: Any) -> None:
    check_resource(response)
    assert response["status"] == "completed" and response["output"]


def check_stream(events: Sequence[StreamEvent]) -> Any:
    """Checks server-sent events and returns the final response."""
    assert events[-1].data == "[DONE]" and len(events) > 4
    return check_events(events[:-1])


def check_events(events: Sequence[StreamEvent]) -> Any:
    """Checks the events of one response and returns how it ended."""
    for number, event in enumerate(events):
        assert event.data["type"] == event.name and event.data["sequence_number"] == number
        check_fields(event.data, EVENTS[event.name])
    assert [event.name for event in events[:2]] == ["response.created", "response.in_progress"]
    return events[-1].data["response"]


def said(*turns: tuple[str, Any]) -> dict[str, Any]:
    items = [{"type": "message", "role": role, "content": content} for role, content in turns]
    return {"model": "any", "input": items}
