"""Every case of the Open Responses acceptance suite, made again: same ids, same requests in substance, same demands.

Two are refused, on purpose and clearly: images, which no model here reads, and WebSockets, an optional transport.
`test_how_many_pass` counts. Source: the case list of openresponses.org/compliance and the specification's schemas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.live_gateway import live_gateway
from tests.fixtures.wire_client import StreamEvent, WireClient, wire_client

PATH = "/v1/responses"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The city and state"}},
        "required": ["location"],
    },
}
WEATHER_CALL = '<tool_call>{"name": "get_weather", "arguments": {"location": "San Francisco, CA"}}</tool_call>'
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


def check_events(events: list[StreamEvent]) -> Any:
    """Checks a stream and returns its final response."""
    assert events[-1].data == "[DONE]"
    assert len(events) > 3
    for number, event in enumerate(events[:-1]):
        assert event.data["type"] == event.name and event.data["sequence_number"] == number
        check_fields(event.data, EVENTS[event.name])
    assert [event.name for event in events[:2]] == ["response.created", "response.in_progress"]
    return events[-2].data["response"]


def said(*turns: tuple[str, Any]) -> dict[str, Any]:
    items = [{"type": "message", "role": role, "content": content} for role, content in turns]
    return {"model": "any", "input": items}


async def basic_response(client: WireClient) -> None:
    check_completed((await client.post(PATH, said(("user", "Say hello in exactly 3 words.")))).body)


async def assistant_phase(client: WireClient) -> None:
    body = said(("user", "Hi."), ("assistant", "Looking it up."), ("assistant", "It is 4."), ("user", "Thanks."))
    body["input"][1]["phase"] = "commentary"
    body["input"][2]["phase"] = "final_answer"
    check_completed((await client.post(PATH, body)).body)


async def response_output_phase_schema(client: WireClient) -> None:
    """The suite checks its own fixture; here: a phase, where an item has one, is one of the two."""
    response = (await client.post(PATH, said(("user", "Hi.")))).body
    check_completed(response)
    assert all(item.get("phase") in (None, "commentary", "final_answer") for item in response["output"])


async def streaming_response(client: WireClient) -> None:
    check_completed(check_events(await client.events(PATH, said(("user", "Count from 1 to 5.")))))


async def system_prompt(client: WireClient) -> None:
    body = said(("system", "You are a pirate. Always respond in pirate speak."), ("user", "Say hello."))
    check_completed((await client.post(PATH, body)).body)


async def tool_calling(client: WireClient) -> None:
    body = {**said(("user", "What's the weather like in San Francisco?")), "tools": [WEATHER]}
    response = (await client.post(PATH, body)).body
    check_completed(response)
    assert "function_call" in [item["type"] for item in response["output"]]


async def tool_calling_streaming(client: WireClient) -> None:
    body = {**said(("user", "What's the weather like in San Francisco?")), "tools": [WEATHER]}
    events = await client.events(PATH, body)
    check_completed(check_events(events))
    names = [event.name for event in events if event.data != "[DONE]" and event.data.get("output_index") == 0]
    assert names == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]


async def multi_turn(client: WireClient) -> None:
    body = said(
        ("user", "My name is Alice."),
        ("assistant", "Hello Alice! Nice to meet you. How can I help you today?"),
        ("user", "What is my name?"),
    )
    check_completed((await client.post(PATH, body)).body)


async def previous_response_id(client: WireClient) -> None:
    first = (await client.post(PATH, said(("user", "My name is Alice.")))).body
    body = {**said(("user", "What is my name?")), "previous_response_id": first["id"]}
    second = (await client.post(PATH, body)).body
    check_completed(second)
    assert second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"] + first["usage"]["output_tokens"]


LAUNCH = said(
    ("user", "We agreed to launch on Tuesday and notify support first."),
    ("assistant", "Understood. The launch is Tuesday, with support notified beforehand."),
)


async def compact_response(client: WireClient) -> None:
    compacted = (await client.post(f"{PATH}/compact", {**LAUNCH, "prompt_cache_key": "compact-test"})).body
    check_fields(compacted, {"id": (str,), "object": (str,), "created_at": (int,), "output": (list,)})
    assert compacted["object"] == "response.compaction"
    check_items(compacted["output"])
    check_usage(compacted["usage"])
    assert "compaction" in [item["type"] for item in compacted["output"]]
    follow = {"model": "any", "input": [*compacted["output"], *said(("user", "When is the launch?"))["input"]]}
    check_completed((await client.post(PATH, follow)).body)


async def compact_missing_model(client: WireClient) -> None:
    reply = await client.post(f"{PATH}/compact", {"input": said(("user", "Compact this conversation."))["input"]})
    assert reply.status == 400 and reply.body["error"]["param"] == "model"


async def image_input(client: WireClient) -> None:
    parts = [
        {"type": "input_text", "text": "What do you see in this image?"},
        {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="},
    ]
    reply = await client.post(PATH, said(("user", parts)))
    assert reply.status == 400 and reply.body["error"]["param"] == "input[0].content[1]"
    assert "only text parts are supported" in reply.body["error"]["message"]


async def websocket(client: WireClient) -> None:
    handshake = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    reply = await client.call("GET", PATH, headers=handshake)
    assert reply.status == 400 and "WebSockets, which are not served" in reply.body["error"]["message"]


Case = Callable[[WireClient], Awaitable[None]]
PASSED: dict[str, tuple[Case, list[str]]] = {
    "basic-response": (basic_response, ["Hello to you"]),
    "assistant-phase": (assistant_phase, ["Welcome"]),
    "response-output-phase-schema": (response_output_phase_schema, ["Hi"]),
    "streaming-response": (streaming_response, ["1 2 3 4 5"]),
    "system-prompt": (system_prompt, ["Ahoy"]),
    "tool-calling": (tool_calling, [WEATHER_CALL]),
    "tool-calling-streaming": (tool_calling_streaming, [WEATHER_CALL]),
    "multi-turn": (multi_turn, ["Alice"]),
    "previous-response-id": (previous_response_id, ["Hello Alice", "Alice"]),
    "compact-response": (compact_response, ["Launch on Tuesday; support first.", "Tuesday"]),
    "compact-missing-model": (compact_missing_model, []),
}
REFUSED: dict[str, tuple[Case, list[str]]] = {
    "image-input": (image_input, []),
    **{
        f"websocket-{name}": (websocket, [])
        for name in (
            "response",
            "sequential-responses",
            "continuation",
            "reconnect-store-false-recovery",
            "generate-false",
            "previous-response-not-found",
            "failed-continuation-evicts-cache",
            "compact-new-chain",
        )
    },
}


@pytest.mark.parametrize("name", PASSED | REFUSED)
def test_case(tmp_path: Path, name: str) -> None:
    case, script = (PASSED | REFUSED)[name]

    async def main() -> None:
        async with live_gateway(tmp_path, script, tokens_per_chunk=2) as live, wire_client(live) as client:
            await case(client)
            assert live.engine.remaining == 0 and not live.engine.stats().running

    asyncio.run(main())
