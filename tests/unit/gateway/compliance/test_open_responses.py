"""Every case of the Open Responses acceptance suite, made again: same ids, same requests in substance, same demands.

One is refused, on purpose and clearly: images, which no model here reads. The cases of WebSockets are in
test_open_responses_sockets.py. Source: the case list of openresponses.org/compliance and the specification's schemas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.live_gateway import live_gateway
from tests.fixtures.wire_client import WireClient, wire_client
from tests.unit.gateway.compliance.open_responses import (
    check_completed,
    check_fields,
    check_items,
    check_stream,
    check_usage,
    said,
)

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
    check_completed(check_stream(await client.events(PATH, said(("user", "Count from 1 to 5.")))))


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
    check_completed(check_stream(events))
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
}


@pytest.mark.parametrize("name", PASSED | REFUSED)
def test_case(tmp_path: Path, name: str) -> None:
    case, script = (PASSED | REFUSED)[name]

    async def main() -> None:
        async with live_gateway(tmp_path, script, tokens_per_chunk=2) as live, wire_client(live) as client:
            await case(client)
            assert live.engine.remaining == 0 and not live.engine.stats().running

    asyncio.run(main())
