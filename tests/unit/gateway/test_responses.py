"""OpenAI Responses on the wire."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.live_gateway import live_gateway
from tests.fixtures.wire_client import CALL, SECOND_CALL, wire_client
from upspiral.gateway.dialects.base import RolloutDesk
from upspiral.gateway.dialects.openai_responses.compaction import PROMPT
from upspiral.gateway.dialects.openai_responses.dialect import read_exchange
from upspiral.gateway.dialects.pieces import carried_text
from upspiral.gateway.request import AnswerRequest, ToolChoice
from upspiral.types import Message

PATH = "/v1/responses"
BASH: dict[str, Any] = {
    "type": "function",
    "name": "bash",
    "description": "Run a shell command.",
    "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    "strict": False,
}
USER: dict[str, Any] = {"type": "message", "role": "user", "content": "How many files?"}
ASK: dict[str, Any] = {"model": "any", "instructions": "Be brief.", "input": [USER]}
ENCRYPTED = {"include": ["reasoning.encrypted_content"]}


def read(body: dict[str, Any]) -> AnswerRequest:
    desk = RolloutDesk("tiny", decode=lambda ids: "", count=lambda request: 0)
    return read_exchange({"model": "any", "input": "hi", **body}, desk).request


def outputs(items: list[Any], *texts: str) -> list[dict[str, Any]]:
    ids = [item["call_id"] for item in items if "call_id" in item]
    return [
        {"type": "function_call_output", "call_id": call_id, "output": text}
        for call_id, text in zip(ids, texts, strict=True)
    ]


def what_codex_keeps(item: dict[str, Any]) -> dict[str, Any]:
    """It sends items back without ids and status, and no content of reasoning."""
    dropped = {"id", "status"} | ({"content"} if item["type"] == "reasoning" else set())
    return {key: value for key, value in item.items() if key not in dropped}


def keep_all(item: dict[str, Any]) -> dict[str, Any]:
    return item


@pytest.mark.parametrize("keep", [keep_all, what_codex_keeps])
def test_a_conversation_with_thinking_and_parallel_calls_is_one_path(tmp_path: Path, keep: Any) -> None:
    async def main() -> None:
        answer = f"<think>two things, Grüße 你</think>Looking.\n{CALL}\n{SECOND_CALL}"
        async with live_gateway(tmp_path, [answer, "3 files", "bye"]) as live, wire_client(live) as client:
            body = {**ASK, "tools": [BASH], "store": False, **ENCRYPTED}
            first = (await client.post(PATH, body)).body
            kinds = [item["type"] for item in first["output"]]
            assert kinds == ["reasoning", "message", "function_call", "function_call"]
            items = [USER, *map(keep, first["output"]), *outputs(first["output"], "a b c", "/")]
            second = (await client.post(PATH, {**body, "input": items})).body
            items += [*map(keep, second["output"]), {"role": "user", "content": "Thanks"}]
            third = (await client.post(PATH, {**body, "input": items})).body
            assert third["output"][0]["content"][0]["text"] == "bye"
            nodes = live.nodes()
            assert [n.reason for n in nodes] == ["root"] + ["append"] * 7
            for response, node in zip([first, second, third], [nodes[2], nodes[5], nodes[7]], strict=True):
                assert node.parent is not None
                prompt = len(live.store.graph("r1").path_ids(node.parent)) + len(live.renderer.generation_prompt)
                usage = response["usage"]
                assert (usage["input_tokens"], usage["output_tokens"]) == (prompt, node.num_sampled)
                assert usage["total_tokens"] == prompt + node.num_sampled
            assert 0 < first["usage"]["output_tokens_details"]["reasoning_tokens"] < first["usage"]["output_tokens"]
            assert second["usage"]["output_tokens_details"]["reasoning_tokens"] == 0

    asyncio.run(main())


@pytest.mark.parametrize("kept", ["encrypted_content", "content", "summary"])
def test_thinking_comes_back_from_whatever_the_client_kept(tmp_path: Path, kept: str) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["<think>hm, 你\n\n</think>one"]) as live, wire_client(live) as client:
            body = {**ASK, **ENCRYPTED, "reasoning": {"effort": "low", "summary": "auto"}}
            reasoning, message = (await client.post(PATH, body)).body["output"]
            assert all(reasoning[key] for key in ("encrypted_content", "content", "summary"))
            echo = {"type": "reasoning", "summary": [], kept: reasoning[kept]}
            assert read({"input": [USER, echo, message, USER]}).messages[1] == Message("assistant", "one", "hm, 你\n\n")

    asyncio.run(main())


def test_a_chain_of_stored_responses(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, [CALL, "3 files", "again", "bye"]) as live, wire_client(live) as client:
            body = {**ASK, "tools": [BASH]}
            first = (await client.post(PATH, body)).body
            assert first["store"] is True
            more = {**body, "input": outputs(first["output"], "a b c"), "previous_response_id": first["id"]}
            events = await client.events(PATH, more)
            second = events[-2].data["response"]
            assert second["previous_response_id"] == first["id"]
            last = {**body, "input": "Thanks", "previous_response_id": second["id"]}
            counted = await client.post(f"{PATH}/input_tokens", last)
            third = (await client.post(PATH, last)).body
            assert counted.body == {"object": "response.input_tokens", "input_tokens": third["usage"]["input_tokens"]}
            assert [n.reason for n in live.nodes()] == ["root"] + ["append"] * 6
            reference = {"type": "item_reference", "id": second["output"][0]["id"]}
            items = [USER, *first["output"], *outputs(first["output"], "a b c"), reference, USER]
            await client.post(PATH, {**body, "input": items})
            assert [n.parent for n in live.nodes()[7:]] == [4, 7], "below the answer that was referred to"

    asyncio.run(main())


def test_stored_responses_are_read_listed_and_deleted(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one", "two", "three"]) as live, wire_client(live) as client:
            first = (await client.post(PATH, ASK)).body
            second = (await client.post(PATH, {**ASK, "input": "More", "previous_response_id": first["id"]})).body
            assert (await client.call("GET", f"{PATH}/{second['id']}")).body == second
            listed = (await client.call("GET", f"{PATH}/{second['id']}/input_items?order=asc&limit=2")).body
            assert [item["role"] for item in listed["data"]] == ["user", "assistant"] and listed["has_more"]
            assert listed["data"][0]["content"] == [{"type": "input_text", "text": "How many files?"}]
            page = f"{PATH}/{second['id']}/input_items?order=asc&after={listed['last_id']}"
            rest = (await client.call("GET", page)).body
            assert [item["content"][0]["text"] for item in rest["data"]] == ["More"] and not rest["has_more"]
            newest = (await client.call("GET", f"{PATH}/{second['id']}/input_items")).body["data"]
            assert newest[::-1] == [*listed["data"], *rest["data"]]
            deleted = await client.call("DELETE", f"{PATH}/{first['id']}")
            assert deleted.body == {"id": first["id"], "object": "response", "deleted": True}
            for method, path in [
                ("GET", f"/{first['id']}"),
                ("DELETE", f"/{first['id']}"),
                ("GET", f"/{first['id']}/input_items"),
                ("POST", f"/{first['id']}/cancel"),
            ]:
                reply = await client.call(method, PATH + path, {} if method == "POST" else None)
                assert reply.status == 404 and reply.body["error"]["param"] == "response_id"
            # What followed it stays whole.
            third = await client.post(PATH, {**ASK, "input": "On", "previous_response_id": second["id"]})
            assert third.status == 200
            cancelled = await client.post(f"{PATH}/{second['id']}/cancel", {})
            assert cancelled.status == 400 and "only background responses" in cancelled.body["error"]["message"]

    asyncio.run(main())


def test_what_one_rollout_stored_no_other_finds(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            live_gateway(tmp_path, ["one"] * 3) as live,
            wire_client(live) as client,
            wire_client(live, "r2") as other,
        ):
            stored = (await client.post(PATH, ASK)).body
            unstored = (await client.post(PATH, {**ASK, "store": False})).body
            for asking, name in [(other, stored["id"]), (client, unstored["id"]), (client, "resp_none"), (client, 5)]:
                reply = await asking.post(PATH, {**ASK, "previous_response_id": name})
                assert reply.status == 404 and reply.body["error"]["code"] == "previous_response_not_found"
                assert reply.body["error"]["param"] == "previous_response_id"
            assert (await other.call("GET", f"{PATH}/{stored['id']}")).status == 404
            reference = {"type": "item_reference", "id": stored["output"][0]["id"]}
            reply = await other.post(PATH, {**ASK, "input": [USER, reference]})
            assert reply.status == 400 and reply.body["error"]["param"] == "input[1].id"
            assert len(live.engine.calls) == 2

    asyncio.run(main())


def test_a_compaction_is_a_recorded_call_and_its_summary_a_message(tmp_path: Path) -> None:
    async def main() -> None:
        script = [CALL, "<think>short</think>Count: 3.", "bye"]
        async with live_gateway(tmp_path, script) as live, wire_client(live) as client:
            body = {**ASK, "tools": [BASH]}
            first = (await client.post(PATH, body)).body
            items = [USER, *first["output"], *outputs(first["output"], "a b c")]
            compacted = (await client.post(f"{PATH}/compact", {**body, "input": items})).body
            assert compacted["object"] == "response.compaction"
            assert [item["type"] for item in compacted["output"]] == ["message", "compaction"]
            nodes = live.nodes()
            assert [n.reason for n in nodes] == ["root"] + ["append"] * 5
            assert nodes[4].message == Message("user", PROMPT)
            assert compacted["usage"]["output_tokens"] == nodes[5].num_sampled
            again = {**body, "input": [*compacted["output"], {"role": "user", "content": "Go on"}]}
            await client.post(PATH, again)
            texts = [n.message.text for n in live.nodes()[6:] if n.message]
            assert texts == ["Summary of the conversation so far:\n\nCount: 3.", "Go on", "bye"]

    asyncio.run(main())


def test_events_in_the_order_of_the_api(tmp_path: Path) -> None:
    async def main() -> None:
        answer = f"<think>hm</think>Looking. {CALL}"
        async with live_gateway(tmp_path, [answer], tokens_per_chunk=4) as live, wire_client(live) as client:
            body = {**ASK, "tools": [BASH], "reasoning": {"summary": "auto"}}
            events = await client.events(PATH, body)
            assert events.pop().data == "[DONE]"
            assert all(event.data["type"] == event.name for event in events)
            assert [event.data["sequence_number"] for event in events] == list(range(len(events)))
            names = [event.name.removeprefix("response.") for event in events]
            assert list(dict.fromkeys(names)) == [
                "created",
                "in_progress",
                "output_item.added",
                "content_part.added",
                "reasoning_summary_part.added",
                "reasoning_text.delta",
                "reasoning_summary_text.delta",
                "reasoning_text.done",
                "content_part.done",
                "reasoning_summary_text.done",
                "reasoning_summary_part.done",
                "output_item.done",
                "output_text.delta",
                "output_text.done",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "completed",
            ]
            final = events[-1].data["response"]
            done = [event.data["item"] for event in events if event.name == "response.output_item.done"]
            assert final["output"] == done and final["status"] == "completed"
            for index, item in enumerate(done):
                of_item = [event.data for event in events if event.data.get("output_index") == index]
                assert of_item[0]["type"].endswith("item.added") and of_item[0]["item"]["id"] == item["id"]
                assert {event["item_id"] for event in of_item if "item_id" in event} <= {item["id"]}
            assert events[0].data["response"]["id"] == final["id"]
            assert events[0].data["response"]["status"] == "in_progress"

    asyncio.run(main())


@pytest.mark.parametrize("answer", ["one two three four five", "<think>one two three four"])
def test_an_answer_that_is_cut_off_is_incomplete(tmp_path: Path, answer: str) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, [answer] * 2) as live, wire_client(live) as client:
            body = {**ASK, "max_output_tokens": 6}
            whole = (await client.post(PATH, body)).body
            last = (await client.events(PATH, body))[-2]
            assert last.name == "response.incomplete"
            for response in (whole, last.data["response"]):
                assert response["status"] == "incomplete" and response["output"][-1]["status"] == "incomplete"
                assert response["incomplete_details"] == {"reason": "max_output_tokens"}
                assert response["usage"]["output_tokens"] == 6 == response["max_output_tokens"]

    asyncio.run(main())


def test_what_breaks_in_a_stream_ends_it_as_failed(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live, wire_client(live) as client:
            events = await client.events(PATH, ASK)
            assert [event.name for event in events] == [
                "response.created",
                "response.in_progress",
                "response.failed",
                "",
            ]
            failed = events[2].data["response"]
            assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"
            assert (await client.call("GET", f"{PATH}/{failed['id']}")).status == 404

    asyncio.run(main())


def test_tools_that_are_no_functions(tmp_path: Path) -> None:
    """Custom tools, namespaces and the local shell: functions for the model, themselves for the agent."""

    async def main() -> None:
        def called(name: str, arguments: dict[str, Any]) -> str:
            return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

        patch = "*** Begin Patch\n"
        answer = (
            called("apply_patch", {"input": patch})
            + called("agents__spawn", {"task": "look"})
            + called("mcp__files__read", {})
            + called("local_shell", {"command": ["ls", "-l"], "timeout_ms": 1000})
            + called("unknown", {"a": 1})
        )
        grammar = {"type": "grammar", "syntax": "lark", "definition": "start: begin"}
        spawn = {"type": "function", "name": "spawn", "parameters": {"type": "object"}}
        tools = [
            {"type": "custom", "name": "apply_patch", "description": "Patches.", "format": grammar},
            {"type": "namespace", "name": "agents", "description": "Agents.", "tools": [spawn]},
            {
                "type": "namespace",
                "name": "mcp__files__",
                "description": "Files.",
                "tools": [{**spawn, "name": "read"}],
            },
            {"type": "local_shell"},
            {"type": "web_search", "external_web_access": False},
            {"type": "image_generation"},
        ]
        async with live_gateway(tmp_path, [answer, answer, "done"]) as live, wire_client(live) as client:
            body = {**ASK, "tools": tools, "store": False}
            output = (await client.post(PATH, body)).body["output"]
            kinds = [item["type"] for item in output]
            assert kinds == ["custom_tool_call", "function_call", "function_call", "local_shell_call", "function_call"]
            assert output[0]["input"] == patch and output[0]["name"] == "apply_patch"
            assert (output[1]["namespace"], output[1]["name"]) == ("agents", "spawn")
            assert (output[2]["namespace"], output[2]["name"]) == ("mcp__files__", "read")
            assert output[3]["action"]["command"] == ["ls", "-l"] and output[3]["action"]["type"] == "exec"
            assert output[4]["name"] == "unknown" and "namespace" not in output[4]
            streamed = (await client.events(PATH, body))[-2].data["response"]["output"]
            assert [without_ids(item) for item in streamed] == [without_ids(item) for item in output]
            results: list[dict[str, Any]] = []
            for item in output:
                kind = "custom_tool_call_output" if item["type"] == "custom_tool_call" else "function_call_output"
                results.append({"type": kind, "call_id": item["call_id"], "output": "ok"})
            await client.post(PATH, {**body, "input": [USER, *map(what_codex_keeps, output), *results]})
            assert [n.reason for n in live.nodes()][4:] == ["append"] * 6
            prompt = live.renderer.decode(live.engine.calls[0].prompt_ids)
            assert "agents__spawn" in prompt and "mcp__files__read" in prompt and "web_search" not in prompt
            assert "lark grammar" in prompt and "start: begin" in prompt

    asyncio.run(main())


def without_ids(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("id", "call_id")}


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "bash", "arguments": '{"command": "ls"}'}
    output = {"type": "function_call_output", "call_id": "c1"}

    def says(role: str, *texts: str) -> dict[str, Any]:
        kind = "output_text" if role == "assistant" else "input_text"
        return {"type": "message", "role": role, "content": [{"type": kind, "text": text} for text in texts]}

    request = read(
        {
            "instructions": "I",
            "input": [
                says("developer", "D"),
                says("user", "A", "B"),
                says("assistant", "one"),
                says("assistant", "two ", "parts"),
                {
                    "type": "reasoning",
                    "summary": [{"type": "summary_text", "text": "hm"}],
                    "encrypted_content": "theirs",
                },
                says("assistant", "three "),
                call,
                says("assistant", "four"),
                {**output, "output": "text"},
                says("developer", "mid-list"),
                {"type": "reasoning", "summary": [], "encrypted_content": "theirs"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                {"role": "user", "content": "end"},
            ],
        }
    )
    assert [(m.role, m.text, m.thinking, len(m.tool_calls)) for m in request.messages] == [
        ("system", "I\n\nD", None, 0),
        ("user", "A\n\nB", None, 0),
        ("assistant", "one", None, 0),
        ("assistant", "two parts", None, 0),
        ("assistant", "three four", "hm", 1),
        ("tool", "text", None, 0),
        ("system", "mid-list", None, 0),
        ("assistant", "No.", None, 0),
        ("user", "end", None, 0),
    ]


def test_options_are_read() -> None:
    request = read({"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 7, "parallel_tool_calls": False})
    assert (request.temperature, request.top_p, request.max_tokens) == (0.5, 0.9, 7)
    assert not request.parallel_tool_calls and request.model == "any" and request.messages == (Message("user", "hi"),)
    second = {**BASH, "name": "edit"}
    for choice, expected in [
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "edit"}, ToolChoice("named", "edit")),
    ]:
        assert read({"tools": [BASH, second], "tool_choice": choice}).tool_choice == expected
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "edit"}]}
    request = read({"tools": [BASH, second], "tool_choice": allowed})
    assert request.tool_choice == ToolChoice("required") and [tool.name for tool in request.tools] == ["edit"]
    custom = {"type": "custom", "name": "patch"}
    assert read({"tools": [custom], "tool_choice": custom}).tool_choice == ToolChoice("named", "patch")


@pytest.mark.parametrize(
    ("change", "field", "complaint"),
    [
        ({"input": []}, "input", "must be a text or a list"),
        ({"input": None}, "input", "must be a text or a list"),
        ({"input": 3}, "input", "must be a list"),
        ({"input": ["x"]}, "input[0]", "must be an object"),
        ({"input": [{"type": "message", "role": "robot", "content": "x"}]}, "input[0].role", "is 'robot'"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
            "input[0].content[0]",
            "only text parts are supported",
        ),
        (
            {"input": [USER, {"type": "function_call_output", "call_id": "c9", "output": "x"}]},
            "input[1].call_id",
            "names no tool call before it",
        ),
        (
            {"input": [USER, {"type": "function_call", "call_id": "c", "name": "bash", "arguments": "{"}]},
            "input[1].arguments",
            "is not valid JSON",
        ),
        ({"input": [USER, {"type": "web_search_call", "id": "w"}]}, "input[1].type", "is 'web_search_call'"),
        (
            {"input": [{"type": "compaction", "encrypted_content": "gAAA"}]},
            "input[0].encrypted_content",
            "was not made by this gateway",
        ),
        ({"instructions": ["x"]}, "instructions", "must be a string"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type", "runs on OpenAI's servers"),
        ({"tools": [{"type": "telepathy"}]}, "tools[0].type", "supported are function"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "must be a non-empty string"),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]},
            "tools[0].tools[0].name",
            "must be a non-empty string",
        ),
        ({"tool_choice": "required"}, "tool_choice", "asks for a tool call"),
        ({"tools": [BASH], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", "names 'x'"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "is not supported"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "is not supported"),
        ({"background": True}, "background", "is not supported"),
        ({"conversation": "conv_1"}, "conversation", "is not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "is not supported"),
        ({"top_logprobs": 3}, "top_logprobs", "is not supported"),
        ({"include": ["message.output_text.logprobs"]}, "include", "is not supported"),
        ({"truncation": "some"}, "truncation", "is 'some'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "must be an integer"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"stream": 1}, "stream", "must be true or false"),
        ({"store": "no"}, "store", "must be true or false"),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, change: dict[str, Any], field: str, complaint: str) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live, wire_client(live) as client:
            for stream in (False, True):
                reply = await client.post(PATH, {**ASK, "stream": stream, **change})
                assert reply.status == 400 and reply.headers["x-request-id"]
                error = reply.body["error"]
                assert error["type"] == "invalid_request_error" and error["param"] == field
                assert error["message"].startswith(field) and complaint in error["message"]
            assert live.engine.calls == [] and live.nodes() == []

    asyncio.run(main())


def test_pages_of_input_items_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one"]) as live, wire_client(live) as client:
            name = (await client.post(PATH, ASK)).body["id"]
            for query in ("limit=0", "limit=101", "limit=x", "limit=1000000", "after=nothing", "order=up"):
                reply = await client.call("GET", f"{PATH}/{name}/input_items?{query}")
                assert reply.status == 400 and reply.body["error"]["param"] == query.partition("=")[0]
            reply = await client.call("GET", f"{PATH}/{name}?stream=true")
            assert reply.status == 400 and reply.body["error"]["param"] == "stream"

    asyncio.run(main())


def test_a_retry_on_another_path_is_another_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["an answer", "a summary"]) as live, wire_client(live) as client:
            body, retry = {"model": "m", "input": "Hi."}, {"x-stainless-retry-count": "1"}
            await client.post("/v1/responses", body)
            compacted = await client.call("POST", "/v1/responses/compact", body, retry)
            assert carried_text("compaction", compacted.body["output"][-1]["encrypted_content"]) == "a summary"

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("custom", {"patch": "x"}),
        ("custom", {"input": "x", "why": "y"}),
        ("custom", {"input": 3}),
        ("custom", {}),
        ("local_shell", {"command": ["ls"], "env": {}, "timeout": 3}),
        ("local_shell", {"cmd": "ls"}),
    ],
)
def test_a_call_that_its_item_cannot_say_is_no_edit(tmp_path: Path, tool: str, arguments: Any, stream: bool) -> None:
    """Codex's apply_patch takes one text; a model that is still learning gives it other arguments."""

    async def main() -> None:
        name = "local_shell" if tool == "local_shell" else "apply_patch"
        script = [f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>", "done"]
        async with live_gateway(tmp_path, script) as live, wire_client(live) as client:
            asked: list[Any] = [{"role": "user", "content": "go"}]
            body = {"model": "m", "store": False, "tools": [{"type": tool, "name": name}]}
            if stream:
                events = await client.events("/v1/responses", {**body, "input": asked})
                answer = next(each.data["response"] for each in events if each.name == "response.completed")
            else:
                answer = (await client.post("/v1/responses", {**body, "input": asked})).body
            call = {key: value for key, value in answer["output"][-1].items() if tool == "local_shell" or key != "id"}
            output = {"type": f"{call['type']}_output", "output": "ok"}
            output |= {"id": call["id"]} if tool == "local_shell" else {"call_id": call["call_id"]}
            sent = {**body, "input": [*asked, call, {**output, "call_id": call["call_id"]}]}
            assert (await client.post("/v1/responses", sent)).status == 200
            assert [node.reason for node in live.nodes()] == ["root", "append", "append", "append"]

    asyncio.run(main())
