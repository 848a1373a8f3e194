"""Anthropic Messages on the wire."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.live_gateway import LiveGateway, live_gateway
from tests.fixtures.wire_client import CALL, SECOND_CALL, WireClient, wire_client
from upspiral.gateway.dialects.anthropic_messages import read_exchange
from upspiral.gateway.dialects.base import RolloutDesk
from upspiral.gateway.request import AnswerRequest, ToolChoice
from upspiral.types import Message

PATH = "/v1/messages"
BASH: dict[str, Any] = {
    "name": "bash",
    "description": "Run a shell command.",
    "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
}
ASK: dict[str, Any] = {
    "model": "claude-any",
    "max_tokens": 500,
    "system": "Be brief.",
    "messages": [{"role": "user", "content": "How many files?"}],
}
THINKING: dict[str, Any] = {"type": "enabled", "budget_tokens": 1024}


def read(body: dict[str, Any]) -> AnswerRequest:
    desk = RolloutDesk("tiny", decode=lambda ids: "", count=lambda request: 0)
    return read_exchange({**ASK, **body}, desk).request


def results(content: list[Any], *texts: str) -> dict[str, Any]:
    ids = [block["id"] for block in content if block["type"] == "tool_use"]
    blocks = [
        {"type": "tool_result", "tool_use_id": i, "content": [{"type": "text", "text": text}]}
        for i, text in zip(ids, texts, strict=True)
    ]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": "Go on."}]}


def go_on(body: dict[str, Any], content: Any, *new: dict[str, Any]) -> dict[str, Any]:
    return {**body, "messages": [*body["messages"], {"role": "assistant", "content": content}, *new]}


def test_a_conversation_with_thinking_and_parallel_calls_is_one_path(tmp_path: Path) -> None:
    async def main() -> None:
        answer = f"<think>two things</think>Looking.\n{CALL}\n{SECOND_CALL}"
        async with live_gateway(tmp_path, [answer, "3 files"]) as live, wire_client(live) as client:
            body = {**ASK, "tools": [BASH], "thinking": THINKING}
            first = (await client.post(PATH, body)).body
            kinds = [block["type"] for block in first["content"]]
            assert kinds == ["thinking", "text", "tool_use", "tool_use"] and first["stop_reason"] == "tool_use"
            assert first["content"][0]["thinking"] == "two things" and first["content"][0]["signature"]
            assert first["content"][3]["input"] == {"command": "pwd", "deep": {"b": [1, True, None]}}
            second = (
                await client.post(PATH, go_on(body, first["content"], results(first["content"], "a b c", "/")))
            ).body
            assert second["content"] == [{"type": "text", "text": "3 files"}] and second["stop_reason"] == "end_turn"
            nodes = live.nodes()
            assert [n.role for n in nodes] == ["system", "user", "assistant", "tool", "tool", "user", "assistant"]
            assert [n.reason for n in nodes] == ["root"] + ["append"] * 6
            check_usage(live, first, 2)
            check_usage(live, second, 6)

    asyncio.run(main())


def check_usage(live: LiveGateway, body: dict[str, Any], node_id: int) -> None:
    """The figures are the recorded tokens."""
    node = live.nodes()[node_id]
    assert node.parent is not None
    prompt = len(live.store.graph("r1").path_ids(node.parent)) + len(live.renderer.generation_prompt)
    assert body["usage"]["input_tokens"] == prompt and body["usage"]["output_tokens"] == node.num_sampled


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}])
def test_thinking_that_was_not_asked_for_is_recorded_but_not_served(tmp_path: Path, thinking: Any) -> None:
    async def main() -> None:
        script = ["<think>hm</think>one"] * 2 + ["two"]
        async with live_gateway(tmp_path, script, tokens_per_chunk=1) as live, wire_client(live) as client:
            body = {**ASK, "thinking": thinking}
            first = (await client.post(PATH, body)).body
            assert first["content"] == [{"type": "text", "text": "one"}]
            names = [event.name for event in await client.events(PATH, body)]
            assert names.count("content_block_start") == 1
            message = live.nodes()[2].message
            assert message is not None and message.thinking == "hm"
            await client.post(PATH, go_on(body, first["content"], {"role": "user", "content": "More"}))
            assert [n.reason for n in live.nodes()] == ["root", "append", "append", "sibling", "append", "append"]

    asyncio.run(main())


def test_omitted_thinking_comes_back_in_its_signature(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["<think>Grüße 你</think>one", "two"]) as live, wire_client(live) as client:
            body = {**ASK, "thinking": {"type": "adaptive", "display": "omitted"}}
            content = (await client.post(PATH, body)).body["content"]
            assert content[0]["thinking"] == ""
            again = read(go_on(body, content, {"role": "user", "content": "More"}))
            assert again.messages[2] == Message("assistant", "one", "Grüße 你")

    asyncio.run(main())


def test_events_in_the_order_of_the_api(tmp_path: Path) -> None:
    async def main() -> None:
        answer = f"<think>hm</think>Looking. {CALL}{SECOND_CALL}"
        async with live_gateway(tmp_path, [answer], tokens_per_chunk=1) as live, wire_client(live) as client:
            events = await client.events(PATH, {**ASK, "tools": [BASH], "thinking": THINKING})
            assert all(event.data["type"] == event.name for event in events)
            names = [event.name for event in events]
            assert names[:2] == ["message_start", "ping"] and names[-2:] == ["message_delta", "message_stop"]
            blocks: list[list[str]] = []
            for event in events[2:-2]:
                if event.name == "content_block_start":
                    blocks.append([event.data["content_block"]["type"]])
                    assert event.data["index"] == len(blocks) - 1
                elif event.name == "content_block_delta":
                    blocks[event.data["index"]].append(event.data["delta"]["type"])
                else:
                    assert event.name == "content_block_stop"
                    blocks[event.data["index"]].append("stop")
            assert [sorted(set(block), key=block.index) for block in blocks] == [
                ["thinking", "thinking_delta", "signature_delta", "stop"],
                ["text", "text_delta", "stop"],
                ["tool_use", "input_json_delta", "stop"],
                ["tool_use", "input_json_delta", "stop"],
            ]
            node = live.nodes()[2]
            assert events[-2].data["usage"]["output_tokens"] == node.num_sampled
            assert events[-2].data["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
            assert events[0].data["message"]["usage"]["output_tokens"] == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "options", "reason", "stop_string"),
    [
        ("one two three", {}, "end_turn", None),
        ("one two three four five", {"max_tokens": 3}, "max_tokens", None),
        ("one HALT two STOP three", {"stop_sequences": ["STOP", "HALT"]}, "stop_sequence", "HALT"),
        ("one two three", {"stop_sequences": ["STOP"]}, "end_turn", None),
        (CALL, {"tools": [BASH]}, "tool_use", None),
        (
            CALL + CALL,
            {"tools": [BASH], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            "tool_use",
            None,
        ),
        (CALL, {"tools": [BASH], "tool_choice": {"type": "none"}}, "end_turn", None),
    ],
)
def test_stop_reasons(tmp_path: Path, answer: str, options: dict[str, Any], reason: str, stop_string: Any) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, [answer] * 2, tokens_per_chunk=2) as live, wire_client(live) as client:
            whole = (await client.post(PATH, {**ASK, **options})).body
            assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, stop_string)
            assert len([block for block in whole["content"] if block["type"] == "tool_use"]) == (reason == "tool_use")
            delta = (await client.events(PATH, {**ASK, **options}))[-2].data["delta"]
            assert delta == {"stop_reason": reason, "stop_sequence": stop_string}

    asyncio.run(main())


def test_tokens_are_counted_as_they_would_be_sent(tmp_path: Path) -> None:
    """Also behind an answer whose sampled tokens no tokenizer would give back."""

    async def main() -> None:
        async with live_gateway(tmp_path) as scratch:
            ids = [token for letter in "files" for token in scratch.renderer.encode_answer(letter)]
        async with live_gateway(tmp_path, [[*ids, 2], "two"]) as live, wire_client(live) as client:
            body = {**ASK, "tools": [BASH]}
            answer = (await client.post(PATH, body)).body
            assert answer["usage"]["output_tokens"] == 6
            longer = go_on(body, answer["content"], {"role": "user", "content": "More"})
            without_limit = {key: value for key, value in longer.items() if key != "max_tokens"}
            counted = await client.post(f"{PATH}/count_tokens?beta=true", without_limit)
            assert len(live.engine.calls) == 1
            served = (await client.post(PATH, longer)).body
            assert counted.body == {"input_tokens": served["usage"]["input_tokens"]}
            assert counted.body["input_tokens"] == len(live.engine.calls[1].prompt_ids)

    asyncio.run(main())


def test_the_billing_line_does_not_reach_the_model() -> None:
    line = "x-anthropic-billing-header: cc_version=2.1; cch={};"
    requests = [
        read({"system": [{"type": "text", "text": line.format(1)}, {"type": "text", "text": "Be brief."}]}),
        read({"system": [{"type": "text", "text": f"{line.format(2)}\n\nBe brief.", "cache_control": {}}]}),
        read({"system": f"{line.format(3)}\nBe brief."}),
        read({"system": "Be brief."}),
    ]
    assert all(request == requests[0] for request in requests)
    assert requests[0].messages[0] == Message("system", "Be brief.")
    assert read({"system": [{"type": "text", "text": line}]}).messages[0].role == "user"


def test_blocks_become_messages() -> None:
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": "t1"}
    use = {"type": "tool_use", "id": "t1", "name": "bash", "input": {"command": "ls"}}
    request = read(
        {
            "system": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "C"}, {"type": "text", "text": "D"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "redacted_thinking", "data": "secret"},
                        {"type": "thinking", "thinking": "T", "signature": "theirs"},
                        {"type": "text", "text": "E "},
                        use,
                        {"type": "text", "text": "F"},
                    ],
                },
                {"role": "system", "content": "G"},
                {
                    "role": "user",
                    "content": [
                        {**result, "content": "no such file", "is_error": True},
                        {**result, "content": "Error: exit code 1", "is_error": True},
                        {**result, "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "I"}]},
                        result,
                        {"type": "text", "text": "J", "cache_control": {"type": "ephemeral"}},
                    ],
                },
            ],
        }
    )
    shown = [(m.role, m.text, m.thinking) for m in request.messages]
    assert shown == [
        ("system", "A\n\nB", None),
        ("user", "C\n\nD", None),
        ("assistant", "E F", "T"),
        ("system", "G", None),
        ("tool", "Error: no such file", None),
        ("tool", "Error: exit code 1", None),
        ("tool", "H\nI", None),
        ("tool", "", None),
        ("user", "J", None),
    ]
    assert json.loads(request.messages[2].tool_calls[0].arguments) == {"command": "ls"}


def test_options_are_read_and_what_does_not_concern_sampling_is_let_through() -> None:
    request = read(
        {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "stop_sequences": ["X"],
            "tools": [{**BASH, "type": "custom", "cache_control": {"type": "ephemeral"}}],
            "tool_choice": {"type": "tool", "name": "bash", "disable_parallel_tool_use": True},
            "metadata": {"user_id": "u"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "betas": ["interleaved-thinking-2025-05-14"],
            "output_config": {"effort": "medium"},
            "service_tier": "auto",
        }
    )
    assert (request.temperature, request.top_p, request.top_k, request.max_tokens) == (0.5, 0.9, 40, 500)
    assert request.stop_strings == ("X",) and request.model == "claude-any" and not request.parallel_tool_calls
    assert request.tool_choice == ToolChoice("named", "bash")
    assert read({"tools": [BASH], "tool_choice": {"type": "any"}}).tool_choice == ToolChoice("required")
    assert read({"tools": [BASH], "tool_choice": {"type": "none"}}).tool_choice == ToolChoice("none")
    assert read({"tools": [], "tool_choice": {"type": "auto"}}).tool_choice == ToolChoice("auto")


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"messages": []}, "messages must be a list with at least one message"),
        ({"messages": "hi"}, "messages must be a list, not 'hi'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role is 'robot'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content must be"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type is 'image'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}
                ]
            },
            "messages[0].content[0].content[0].type is 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            "messages[0].content[0].tool_use_id must be",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "b", "input": 3}]}
                ]
            },
            "messages[0].content[0].input must be an object",
        ),
        (
            {"messages": [*ASK["messages"], {"role": "assistant", "content": "It is"}]},
            "messages[1].role is 'assistant': answers that begin with given text",
        ),
        ({"system": 3}, "system must be a list"),
        ({"system": [IMAGE]}, "system[0].type is 'image'"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type is 'web_search_20250305'"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name must be"),
        ({"tools": [{"name": "x", "input_schema": 3}]}, "tools[0].input_schema must be an object"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type asks for a tool call"),
        ({"tools": [BASH], "tool_choice": {"type": "tool", "name": "sh"}}, "tool_choice.name names 'sh'"),
        ({"stop_sequences": "x"}, "stop_sequences must be a list"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": -1}, "top_k must be an integer"),
        ({"thinking": {"type": "maybe"}}, "thinking.type is 'maybe'"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers = "),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format = "),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live, wire_client(live) as client:
            for stream in (False, True):
                reply = await client.post(PATH, {**ASK, "stream": stream, **change})
                assert reply.status == 400 and reply.headers["request-id"] == reply.body["request_id"]
                assert reply.body["type"] == "error" and reply.body["error"]["type"] == "invalid_request_error"
                assert complaint in reply.body["error"]["message"]
            assert live.engine.calls == [] and live.nodes() == []

    asyncio.run(main())


def test_errors_have_anthropics_types(tmp_path: Path) -> None:
    async def error(client: WireClient, path: str = PATH, method: str = "POST") -> tuple[int, str, str]:
        reply = await client.call(method, path, ASK if method == "POST" else None, {"anthropic-version": "2023-06-01"})
        assert reply.body["type"] == "error" and reply.body["request_id"] == reply.headers["request-id"]
        assert reply.headers["x-should-retry"] == "false"
        return reply.status, reply.body["error"]["type"], reply.body["error"]["message"]

    async def main() -> None:
        async with live_gateway(tmp_path, context_length=20) as live, wire_client(live) as client:
            status, kind, message = await error(client)
            assert (status, kind) == (400, "invalid_request_error") and message.startswith("prompt is too long: ")
            assert (await error(client, "/v1/nothing"))[:2] == (404, "not_found_error")
            assert (await error(client, PATH, "GET"))[0] == 405
            client.key = "sk-none"
            assert (await error(client))[:2] == (401, "authentication_error")
        async with live_gateway(tmp_path / "second") as live, wire_client(live) as client:
            assert (await error(client))[:2] == (500, "api_error")
            await live.gateway.seal_rollout("r1")
            assert (await error(client))[0] == 409

    asyncio.run(main())


def test_what_breaks_in_a_stream_is_its_last_event(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live, wire_client(live) as client:
            events = await client.events(PATH, ASK)
            assert [event.name for event in events] == ["message_start", "ping", "error"]
            assert events[-1].data["error"]["type"] == "api_error" and events[-1].data["request_id"]

    asyncio.run(main())


def test_keys_and_models_in_anthropics_way(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one", "two"]) as live, wire_client(live) as client:
            key, client.key = client.key, "none"
            headers = {"x-api-key": key, "authorization": "", "anthropic-version": "2023-06-01"}
            assert (await client.call("POST", f"{PATH}?beta=true", ASK, headers)).status == 200
            assert (await client.post(f"/r/{key}{PATH}", ASK)).status == 200
            listed = (await client.call("GET", "/v1/models", headers=headers)).body
            assert listed["first_id"] == listed["last_id"] == "tiny" and listed["data"][0]["type"] == "model"
            one = (await client.call("GET", f"/r/{key}/v1/models/claude-x", headers=headers)).body
            assert one["id"] == "claude-x" and one["display_name"]

    asyncio.run(main())
