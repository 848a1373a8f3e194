"""The gateway through the openai SDK, over a real socket."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI

from tests.fixtures.live_gateway import BASH, LiveGateway, live_gateway
from upspiral.gateway.dialects.base import RolloutDesk
from upspiral.gateway.dialects.openai_chat import read_exchange
from upspiral.gateway.request import AnswerRequest, ToolChoice
from upspiral.types import Rollout

CALL = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
SECOND_CALL = (
    '<tool_call>\n{"name": "bash", "arguments": {"command": "pwd", "deep": {"b": [1, true, null]}}}\n</tool_call>'
)
ASK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many files?"}]


async def ask(client: AsyncOpenAI, messages: list[Any], **options: Any) -> Any:
    return await client.chat.completions.create(model="any", messages=messages, **options)


def echo(message: Any) -> dict[str, Any]:
    return message.model_dump(exclude_none=True)


def result(call_id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def check_law_one(live: LiveGateway, rollout_id: str = "r1") -> None:
    """Each answer's path is exactly what the engine received and returned."""
    graph = live.store.graph(rollout_id)
    prompt = live.renderer.generation_prompt
    wanted = {call.prompt_ids for call in live.engine.calls}
    for node in graph.nodes:
        if not node.sampled.any():
            continue
        parent = graph.path_ids(node.parent).tolist() if node.parent is not None else []
        assert tuple(parent + prompt.tolist()) in wanted
        assert node.token_ids[: len(prompt)].tolist() == prompt.tolist()
        assert not node.sampled[: len(prompt)].any() and node.sampled[len(prompt) :].all()


def test_a_conversation_with_parallel_calls_is_one_path(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, [f"Looking.\n{CALL}\n{SECOND_CALL}", "3 files", "Bye"]) as live:
            client = live.open()
            first = await ask(client, ASK, tools=[BASH])
            choice = first.choices[0]
            assert choice.finish_reason == "tool_calls" and choice.message.content == "Looking."
            names = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
            assert names == [("bash", {"command": "ls"}), ("bash", {"command": "pwd", "deep": {"b": [1, True, None]}})]
            ids = [c.id for c in choice.message.tool_calls]
            messages = [*ASK, echo(choice.message), result(ids[0], "a b c"), result(ids[1], "/")]
            second = await ask(client, messages, tools=[BASH])
            assert second.choices[0].message.content == "3 files" and second.choices[0].finish_reason == "stop"
            assert second.model == "tiny"
            messages += [echo(second.choices[0].message), {"role": "user", "content": "Thanks"}]
            await ask(client, messages, tools=[BASH])
            nodes = live.nodes()
            roles = ["system", "user", "assistant", "tool", "tool", "assistant", "user", "assistant"]
            assert [n.role for n in nodes] == roles
            assert [n.parent for n in nodes] == [None, 0, 1, 2, 3, 4, 5, 6]
            assert [n.reason for n in nodes] == ["root"] + ["append"] * 7
            for response, node in zip([first, second], [nodes[2], nodes[5]], strict=True):
                assert node.parent is not None
                prompt = len(live.store.graph("r1").path_ids(node.parent)) + len(live.renderer.generation_prompt)
                assert response.usage.prompt_tokens == prompt
                assert response.usage.completion_tokens == node.num_sampled
            check_law_one(live)

    asyncio.run(main())


def test_clients_may_rewrite_what_means_the_same(tmp_path: Path) -> None:
    """Other ids, other JSON spacing and key order, "" for null, no thinking: still the same path."""

    async def main() -> None:
        script = [f"<think>hm</think>\n{SECOND_CALL}", "done"]
        async with live_gateway(tmp_path, script) as live:
            client = live.open()
            message = (await ask(client, ASK, tools=[BASH])).choices[0].message
            assert message.content is None and message.reasoning_content == "hm"
            arguments = '{"deep":{"b":[1,true,null]},"command":"p\\u0077d"}'
            function = {"name": "bash", "arguments": arguments}
            rewritten = {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "mine", "type": "function", "function": function}],
            }
            await ask(client, [*ASK, rewritten, result("mine", "/")], tools=[BASH])
            assert [n.reason for n in live.nodes()] == ["root"] + ["append"] * 4
            check_law_one(live)

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer", ["Hm.\n\nYes é😀. \n", f"<think>so</think>Looking.\n{CALL}\n{SECOND_CALL}", f"{CALL}{{"]
)
def test_a_stream_adds_up_to_the_answer(tmp_path: Path, answer: str) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, [answer, answer], tokens_per_chunk=1) as live:
            client = live.open()
            options: dict[str, Any] = {"tools": [BASH], "logprobs": True}
            whole = await ask(client, ASK, **options)
            async with client.chat.completions.stream(
                model="m", messages=ASK, stream_options={"include_usage": True}, **options
            ) as stream:
                chunks = [event.chunk async for event in stream if event.type == "chunk"]
                final: Any = await stream.get_final_completion()
            texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
            assert not any(text and "<tool" in text for text in texts) or "{" in answer[-1:]
            assert final.usage == whole.usage
            streamed, expected = final.choices[0], whole.choices[0]
            assert (streamed.message.content or "") == (expected.message.content or "")
            assert calls(streamed.message) == calls(expected.message)
            assert streamed.finish_reason == expected.finish_reason
            logprobs = [entry.logprob for entry in streamed.logprobs.content]
            assert len(logprobs) == final.usage.completion_tokens
            assert [e.token for e in streamed.logprobs.content] == [e.token for e in expected.logprobs.content]
            nodes = live.nodes()
            assert nodes[2].token_ids.tolist() == nodes[3].token_ids.tolist()
            assert [n.reason for n in nodes] == ["root", "append", "append", "sibling"]
            thinking = "".join(
                c.choices[0].delta.model_dump().get("reasoning_content") or "" for c in chunks if c.choices
            )
            assert thinking == (whole.choices[0].message.model_dump().get("reasoning_content") or "")

    asyncio.run(main())


def calls(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def test_streaming_is_real(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["a b c d e f g h"], tokens_per_chunk=1, pause_s=0.02) as live:
            stream = await ask(live.open(), ASK, stream=True)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            assert live.engine.stats().running == 1
            await stream.close()

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_cancels_and_the_tokens_are_kept(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["long " * 400, "short"], tokens_per_chunk=1, pause_s=0.01) as live:
            client = live.open()
            if stream:
                opened = await ask(client, ASK, stream=True)
                async for chunk in opened:
                    if chunk.choices[0].delta.content:
                        break
                await opened.close()
            else:
                with pytest.raises(openai.APITimeoutError):
                    await ask(client.with_options(timeout=0.4, max_retries=0), ASK)
            await until(lambda: len(live.nodes()) == 3)
            node = live.nodes()[2]
            assert not node.delivered and node.finish_reason == "cancelled" and 0 < node.num_sampled < 400
            assert live.engine.stats().running == 0
            assert live.engine.stats().sampled_tokens == node.num_sampled
            await ask(client, ASK)
            retry = live.nodes()[3]
            assert retry.parent == node.parent and retry.reason == "sibling" and retry.delivered

    asyncio.run(main())


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def test_sealing_cancels_what_is_in_flight_and_refuses_stragglers(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["long " * 400], tokens_per_chunk=1, pause_s=0.01) as live:
            client = live.open()
            running = asyncio.create_task(ask(client, ASK))
            await until(lambda: live.engine.stats().sampled_tokens > 3)
            await live.gateway.seal_rollout("r1")
            assert live.engine.stats().running == 0
            with pytest.raises(openai.ConflictError, match="ended while this request was answered"):
                await running
            recorded = [n.id for n in live.nodes()]
            assert live.store.graph("r1").num_sampled == live.engine.stats().sampled_tokens
            with pytest.raises(openai.ConflictError, match="r1 has ended") as caught:
                await ask(client, ASK)
            assert caught.value.code == "rollout_sealed"
            assert [n.id for n in live.nodes()] == recorded and len(live.engine.calls) == 1
            await live.gateway.seal_rollout("r1")
            assert live.gateway.failure("r1") is None and live.gateway.truncation("r1") is None

    asyncio.run(main())


def test_edits_fork_and_say_why(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one", "two", "three", "four", "five"]) as live:
            client = live.open()
            first = echo((await ask(client, ASK)).choices[0].message)
            go_on = {"role": "user", "content": "Go on"}
            second = echo((await ask(client, [*ASK, first, go_on])).choices[0].message)
            # The second answer is rewritten: the first is kept as sampled, the rewritten one is context.
            edited = {**second, "content": "TWO"}
            await ask(client, [*ASK, first, go_on, edited, go_on])
            nodes = live.nodes()
            assert [n.message.text for n in nodes[5:7] if n.message] == ["TWO", "Go on"]
            assert nodes[5].parent == 3 and nodes[5].reason == "edited" and not nodes[5].sampled.any()
            assert nodes[7].parent == 6 and nodes[7].reason == "append"
            # Other tools: everything is rendered again.
            await ask(client, [*ASK, first, go_on], tools=[BASH])
            assert live.nodes()[8].parent is None and live.nodes()[8].reason == "tools"
            # Another system prompt begins another tree.
            await ask(client, [{"role": "system", "content": "Sub-agent"}, go_on])
            nodes = live.nodes()
            assert [(n.parent, n.reason) for n in nodes if n.parent is None] == [
                (None, "root"),
                (None, "tools"),
                (None, "root"),
            ]
            check_law_one(live)

    asyncio.run(main())


def test_several_answers_are_siblings(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one", "two", "three", "four"]) as live:
            client = live.open()
            response = await ask(client, ASK, n=3)
            assert [c.index for c in response.choices] == [0, 1, 2]
            texts = [c.message.content for c in response.choices]
            assert sorted(texts) == ["one", "three", "two"]
            nodes = live.nodes()
            assert [n.parent for n in nodes] == [None, 0, 1, 1, 1]
            assert response.usage.completion_tokens == sum(n.num_sampled for n in nodes)
            chosen = echo(response.choices[1].message)
            await ask(client, [*ASK, chosen, {"role": "user", "content": "Go on"}])
            assert live.nodes()[5].parent == 3
            check_law_one(live)

    asyncio.run(main())


def test_concurrent_requests_of_one_rollout_share_their_context(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, [f"answer {i}" for i in range(8)], pause_s=0.002) as live:
            client = live.open()
            await asyncio.gather(*(ask(client, ASK, stream=False) for _ in range(8)))
            nodes = live.nodes()
            assert [n.parent for n in nodes] == [None, 0] + [1] * 8
            check_law_one(live)

    asyncio.run(main())


def test_limits_and_sampling_parameters(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one two three four five six seven"] * 4) as live:
            client = live.open("free")
            short = await ask(client, ASK, max_completion_tokens=3, temperature=0.5, top_p=0.9, seed=5)
            assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3
            params = live.engine.calls[0].params
            assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.5, 0.9, 5, 3)
            assert params.stop_token_ids == (2,)
            bound = live.open("bound", temperature=1.0, top_p=1.0, max_completion_tokens=4, max_calls=2, seed=11)
            for _ in range(2):
                await ask(bound, ASK, max_tokens=100, temperature=0.0, top_p=0.5, seed=5)
            params = [call.params for call in live.engine.calls[1:]]
            assert [(p.temperature, p.top_p, p.max_tokens) for p in params] == [(1.0, 1.0, 4)] * 2
            assert params[0].seed != params[1].seed and 5 not in [p.seed for p in params]
            assert live.gateway.truncation("bound") is None
            with pytest.raises(openai.BadRequestError, match="2 model calls") as caught:
                await ask(bound, ASK)
            assert caught.value.code == "max_calls"
            assert live.gateway.truncation("bound") == "max_calls"
            assert len(live.engine.calls) == 3

    asyncio.run(main())


def test_stop_strings_cut_the_text_and_record_the_tokens(tmp_path: Path) -> None:
    async def main() -> None:
        answer = "one two STOP three four five six seven eight"
        async with live_gateway(tmp_path, [answer, "more"], tokens_per_chunk=2) as live:
            client = live.open()
            response = await ask(client, ASK, stop=["STOP"])
            assert response.choices[0].message.content == "one two " and response.choices[0].finish_reason == "stop"
            node = live.nodes()[2]
            assert node.finish_reason == "cancelled" and node.num_sampled == response.usage.completion_tokens
            assert node.num_sampled < len(live.renderer.encode_answer(answer))
            go_on = {"role": "user", "content": "Go on"}
            await ask(client, [*ASK, echo(response.choices[0].message), go_on])
            assert live.nodes()[3].token_ids[0] == 2, "the missing end of the turn comes first"
            check_law_one(live)

    asyncio.run(main())


def test_one_call_when_parallel_calls_are_off_and_none_without_tools(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, [CALL + SECOND_CALL, CALL, CALL]) as live:
            client = live.open()
            one = await ask(client, ASK, tools=[BASH], parallel_tool_calls=False)
            assert len(one.choices[0].message.tool_calls) == 1 and one.choices[0].finish_reason == "tool_calls"
            for options in ({"tools": [BASH], "tool_choice": "none"}, {}):
                response = await ask(client, ASK, **options)
                assert response.choices[0].message.content == CALL and response.choices[0].finish_reason == "stop"

    asyncio.run(main())


def test_a_broken_tool_call_arrives_as_text_with_the_reason(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["<tool_call>{oops</tool_call>"] * 2) as live:
            client = live.open()
            response = await ask(client, ASK, tools=[BASH])
            assert response.choices[0].message.content == "<tool_call>{oops</tool_call>"
            assert "tool call 1 is not valid JSON" in response.model_extra["upspiral"]["parse_errors"][0]
            chunks = [chunk async for chunk in await ask(client, ASK, tools=[BASH], stream=True)]
            assert chunks[-1].model_extra == response.model_extra

    asyncio.run(main())


def choose(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allow(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [choose(name) for name in names]}}


def test_tool_choice_in_all_its_forms() -> None:
    second = {"type": "function", "function": {"name": "edit"}}
    for choice, expected, names in [
        (None, ToolChoice("auto"), ["bash", "edit"]),
        ("auto", ToolChoice("auto"), ["bash", "edit"]),
        ("none", ToolChoice("none"), ["bash", "edit"]),
        ("required", ToolChoice("required"), ["bash", "edit"]),
        (choose("edit"), ToolChoice("named", "edit"), ["bash", "edit"]),
        (allow("auto", "edit"), ToolChoice("auto"), ["edit"]),
        (allow("required", "edit", "bash"), ToolChoice("required"), ["bash", "edit"]),
    ]:
        request = read({"tools": [BASH, second], "tool_choice": choice})
        assert request.tool_choice == expected and [tool.name for tool in request.tools] == names


def read(body: dict[str, Any]) -> AnswerRequest:
    desk = RolloutDesk("tiny", decode=lambda ids: "", count=lambda request: 0)
    return read_exchange({"model": "any", "messages": ASK, **body}, desk).request


def test_messages_in_all_their_forms() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = read(
        {
            "messages": [
                {"role": "developer", "content": "D"},
                {"role": "user", "content": parts, "name": "me"},
                {"role": "system", "content": "mid-list"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": None, "refusal": "Because.", "reasoning_content": "hm"},
                {"role": "user", "content": "Then?"},
            ]
        }
    )
    assert [(m.role, m.text, m.thinking) for m in request.messages] == [
        ("system", "D", None),
        ("user", "ab", None),
        ("system", "mid-list", None),
        ("assistant", "No.", None),
        ("user", "Why?", None),
        ("assistant", "Because.", "hm"),
        ("user", "Then?", None),
    ]
    assert request.model == "any"


def test_top_k_and_min_p_filter_unless_the_owner_decides(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one"] * 3) as live:
            for name, policy, extra in [
                ("a", {}, {"top_k": 5, "min_p": 0.1}),
                ("b", {}, {"top_k": -1}),
                ("c", {"top_p": 1.0}, {"top_k": 5, "min_p": 0.1}),
            ]:
                await ask(live.open(name, **policy), ASK, extra_body=extra)
            sampled_with = [(call.params.top_k, call.params.min_p) for call in live.engine.calls]
            assert sampled_with == [(5, 0.1), (0, 0.0), (0, 0.0)]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"messages": []}, "messages must be a list with at least one message"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role is 'robot'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text parts"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].tool_call_id must be"),
        ({"tool_choice": "required"}, "tool_choice asks for a tool call, but tools offers none"),
        ({"tool_choice": "some"}, "tool_choice = 'some' is not supported"),
        ({"tool_choice": {"type": "function"}}, r"tool_choice\.function\.name must be"),
        (
            {"tools": [BASH], "tool_choice": choose("sh")},
            r"tool_choice\.function\.name names 'sh', and tools offers bash",
        ),
        ({"tools": [BASH], "tool_choice": allow("auto", "sh")}, r"tool_choice\.allowed_tools\.tools names 'sh'"),
        ({"tools": [BASH], "tool_choice": allow("auto")}, r"tool_choice\.allowed_tools\.tools allows no tool"),
        ({"tools": [BASH], "tool_choice": allow("some", "bash")}, r"tool_choice\.allowed_tools\.mode is 'some'"),
        ({"functions": [{"name": "f"}]}, "functions is the deprecated form of tools"),
        ({"function_call": "auto"}, "function_call is the deprecated form of tool_choice"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, r"messages\[0\]\.function_call"),
        ({"messages": [{"role": "assistant", "reasoning_content": 3}]}, r"messages\[0\]\.reasoning_content must be"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, r"tools\[0\]\.type is 'custom'"),
        ({"stream_options": {"include_usage": 1}}, r"stream_options\.include_usage must be true or false"),
        ({"model": 3}, "model must be a string"),
        ({"top_k": -2}, "top_k must be an integer of at least -1"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\].function.name must be"),
        ({"tools": [3]}, r"tools\[0\] must be an object"),
        ({"n": 0}, "n must be an integer from 1 to 128"),
        ({"temperature": "hot"}, "temperature must be a number of at least 0"),
        ({"temperature": True}, "temperature must be a number"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"stop": [""]}, "stop must be"),
        ({"stream": 1}, "stream must be true or false"),
        ({"response_format": {"type": "json_object"}}, "response_format = .* is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
    ],
)
def test_bad_requests_name_the_field(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live:
            key = live.gateway.open_rollout(Rollout("r1", "t", "g"))
            status, body = await post(live, {"model": "m", "messages": ASK, **change}, key)
            assert status == 400
            assert body["error"]["type"] == "invalid_request_error" and body["error"]["code"] == "invalid_request"
            assert body["error"]["message"].startswith(body["error"]["param"])
            assert re.search(complaint, body["error"]["message"]), body
            assert live.engine.calls == [] and live.nodes() == []

    asyncio.run(main())


async def post(live: LiveGateway, body: Any, key: str, path: str = "/v1/chat/completions") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Bearer {key}"}
        async with session.post(live.url + path, data=data, headers=headers) as response:
            return response.status, await response.json()


def test_bodies_and_keys_that_are_wrong(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live:
            key = live.gateway.open_rollout(Rollout("r1", "t", "g"))
            for raw in (b"{", b"[]", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xff"):
                status, body = await post(live, raw, key)
                assert status == 400 and "body" in body["error"]["message"]
            with pytest.raises(openai.AuthenticationError, match="no rollout has the API key sk-dead") as caught:
                await ask(live.client("sk-dead"), ASK)
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError, match="this is the admin key"):
                await ask(live.client("ak-up-test"), ASK)
            assert (await post(live, {}, "", "/v1/nothing"))[0] == 404

    asyncio.run(main())


def test_broken_arguments_in_the_history_are_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path) as live:
            function = {"name": "bash", "arguments": '{"command": '}
            broken = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
            expected = r"messages\[2\]\.tool_calls\[0\]\.function\.arguments of 'bash' is not valid JSON"
            with pytest.raises(openai.BadRequestError, match=expected):
                await ask(live.open(), [*ASK, broken, result("c", "x")])

    asyncio.run(main())


def test_a_prompt_that_does_not_fit_names_both_numbers(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one"], context_length=40) as live:
            client = live.open()
            with pytest.raises(
                openai.BadRequestError, match=r"the prompt has \d+ tokens and the model's context holds 40"
            ) as e:
                await ask(client, [{"role": "user", "content": "many words " * 40}])
            assert e.value.code == "context_length_exceeded"
            assert live.gateway.truncation("r1") == "context_length_exceeded"
            # A shorter history is answered, within the room that is left.
            response = await ask(client, [{"role": "user", "content": "a"}])
            assert response.choices[0].message.content == "one"
            assert live.gateway.truncation("r1") is None

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_failing_engine_is_an_error_and_marks_the_rollout(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one"]) as live:
            client = live.open()
            await ask(client, ASK)
            with pytest.raises(openai.APIError, match="the script has 1 lines, and answer 2"):
                response = await ask(client, ASK, stream=stream)
                async for _ in response:
                    pass
            assert "the script has 1 lines" in (live.gateway.failure("r1") or "")
            with pytest.raises(openai.InternalServerError, match="cannot go on"):
                await ask(client, ASK)
            assert len(live.nodes()) == 3

    asyncio.run(main())


def test_versions_and_logprobs_are_recorded_per_token(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one two"], tokens_per_chunk=1, pause_s=0.01) as live:
            running = asyncio.create_task(ask(live.open(), ASK))
            await until(lambda: live.engine.stats().sampled_tokens == 2)
            live.engine.version = 1
            await running
            node = live.nodes()[2]
            versions = node.versions[node.sampled]
            assert versions[0] == 0 and versions[-1] == 1 and set(node.versions[~node.sampled]) == {-1}
            assert np.isnan(node.logprobs[~node.sampled]).all() and (node.logprobs[node.sampled] == -1).all()

    asyncio.run(main())


def test_models_health_and_metrics(tmp_path: Path) -> None:
    async def main() -> None:
        async with live_gateway(tmp_path, ["one"]) as live:
            client = live.open()
            assert [model.id async for model in client.models.list()] == ["tiny"]
            await ask(client, ASK)
            async with aiohttp.ClientSession() as session:
                health = await (await session.get(f"{live.url}/health")).json()
                assert health == {"status": "ok", "policy_version": 0, "live_rollouts": 1}
                metrics = await (await session.get(f"{live.url}/metrics")).text()
            sampled = sum(n.num_sampled for n in live.nodes())
            assert f"upspiral_gateway_sampled_tokens_total {sampled}.0" in metrics
            assert 'upspiral_gateway_requests_total{status="200"} 1.0' in metrics
            assert 'upspiral_engine{figure="running"} 0.0' in metrics

    asyncio.run(main())
