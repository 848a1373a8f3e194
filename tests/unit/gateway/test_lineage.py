"""Retries, sub-agents, compaction and side calls: where nodes hang, which edges join them, what is never trained."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.fixtures.live_gateway import ADMIN_KEY, LiveGateway, live_gateway
from upspiral.gateway.request import SessionPolicy
from upspiral.types import Edge, Rollout

PROMPT = "Count the lines of every log file below /srv and report the total."
SUMMARY = "We counted 42 lines in three log files; the largest is app.log."
TASK_TOOL = {"type": "function", "function": {"name": "task", "parameters": {"type": "object"}}}
RETRY = {"x-stainless-retry-count": "1"}


def call_of(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


class Caller:
    """Speaks for one rollout."""

    def __init__(self, live: LiveGateway, http: aiohttp.ClientSession, **policy: Any) -> None:
        self._live, self._http = live, http
        self._key = live.gateway.open_rollout(Rollout("r1", "task", "group"), policy=SessionPolicy(**policy))

    async def ask(
        self, messages: list[dict[str, Any]], headers: dict[str, str] | None = None, **body: Any
    ) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self._key}", **(headers or {})}
        request = {"model": "tiny", "messages": messages, **body}
        async with self._http.post(f"{self._live.url}/v1/chat/completions", json=request, headers=headers) as response:
            answer = await response.json()
            assert response.status == 200, answer
        return answer

    async def ask_and_hang_up(self, messages: list[dict[str, Any]]) -> None:
        headers = {"authorization": f"Bearer {self._key}"}
        request = {"model": "tiny", "messages": messages, "stream": True}
        async with self._http.post(f"{self._live.url}/v1/chat/completions", json=request, headers=headers) as response:
            await response.content.readline()
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)

    async def graph(self) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with self._http.get(f"{self._live.url}/admin/rollouts/r1/graph", headers=headers) as response:
            return await response.json()


def message_of(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["choices"][0]["message"]


def test_a_retry_gets_the_same_answer_and_records_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        async with live_gateway(tmp_path, ["one", "two"]) as live, aiohttp.ClientSession() as http:
            caller = Caller(live, http)
            first = await caller.ask([said("user", "hello")])
            again = await caller.ask([said("user", "hello")], RETRY)
            assert message_of(again) == message_of(first) and again["usage"] == first["usage"]
            assert len(live.engine.calls) == 1 and len(live.nodes()) == 2
            # Without the marker the agent means it.
            assert message_of(await caller.ask([said("user", "hello")]))["content"] == "two"
            assert [node.reason for node in live.nodes()] == ["root", "append", "sibling"]

    asyncio.run(scene())


def test_a_retry_joins_the_answer_that_is_being_sampled(tmp_path: Path) -> None:
    async def scene() -> None:
        async with (
            live_gateway(tmp_path, ["a rather long answer"], pause_s=0.02) as live,
            aiohttp.ClientSession() as http,
        ):
            caller = Caller(live, http)
            answers = await asyncio.gather(
                caller.ask([said("user", "hello")]), caller.ask([said("user", "hello")], RETRY)
            )
            assert message_of(answers[0]) == message_of(answers[1])
            assert len(live.engine.calls) == 1 and len(live.nodes()) == 2

    asyncio.run(scene())


def test_a_retry_of_an_answer_that_never_arrived_is_sampled_anew_and_only_that_is_trained(tmp_path: Path) -> None:
    async def scene() -> None:
        async with (
            live_gateway(tmp_path, ["word " * 100, "short"], pause_s=0.01) as live,
            aiohttp.ClientSession() as http,
        ):
            caller = Caller(live, http)
            await caller.ask_and_hang_up([said("user", "hello")])
            live.engine.pause_s = 0.0
            await caller.ask([said("user", "hello")], RETRY)
            nodes = live.nodes()
            assert [node.reason for node in nodes] == ["root", "append", "retry"]
            graph = live.store.graph("r1")
            assert graph.edges == [Edge("retry", 1, 2, "header")]
            assert [graph.withheld(node) for node in nodes] == [None, "undelivered", None]

    asyncio.run(scene())


def test_a_sub_agent_is_spawned_by_a_call_and_joins_with_its_answer(tmp_path: Path) -> None:
    async def scene() -> None:
        script = [call_of("task", prompt=PROMPT), "There are 42 lines.", "Done: 42."]
        async with live_gateway(tmp_path, script) as live, aiohttp.ClientSession() as http:
            caller = Caller(live, http)
            history = [said("system", "You lead."), said("user", "How many lines?")]
            answer = message_of(await caller.ask(history, tools=[TASK_TOOL]))
            await caller.ask([said("system", "You count."), said("user", PROMPT)])
            result = {"role": "tool", "tool_call_id": answer["tool_calls"][0]["id"], "content": "There are 42 lines."}
            await caller.ask([*history, answer, result], tools=[TASK_TOOL])
            graph = live.store.graph("r1")
            assert [node.reason for node in graph.nodes if node.parent is None] == ["root", "spawn"]
            assert graph.edges == [Edge("spawn", 2, 3), Edge("join", 5, 6)]
            assert (await caller.graph())["edges"][0] == {
                "kind": "spawn", "source": 2, "target": 3, "evidence": "content",
            }  # fmt: skip

    asyncio.run(scene())


def test_a_sub_agent_that_is_offered_other_tools_is_spawned_once(tmp_path: Path) -> None:
    """Other tools make another tree; its conversation is the one that it repeats, and comes home from there."""

    async def scene() -> None:
        script = [call_of("task", prompt=PROMPT), "Let me see.", "It is done.", "Fine."]
        async with live_gateway(tmp_path, script) as live, aiohttp.ClientSession() as http:
            caller = Caller(live, http)
            history = [said("user", "How many lines?")]
            main, sub = {"x-session-id": "main"}, {"x-session-id": "sub", "x-parent-session-id": "main"}
            asked = message_of(await caller.ask(history, main, tools=[TASK_TOOL]))
            seen = message_of(await caller.ask([said("user", PROMPT)], sub))
            on = [said("user", PROMPT), seen, said("user", "Go on.")]
            await caller.ask(on, sub, tools=[TASK_TOOL])
            result = {"role": "tool", "tool_call_id": asked["tool_calls"][0]["id"], "content": "Result:\nIt is done."}
            await caller.ask([*history, asked, result], main, tools=[TASK_TOOL])
            graph = live.store.graph("r1")
            assert [node.reason for node in graph.nodes if node.parent is None] == ["root", "spawn", "tools"]
            assert graph.edges == [Edge("spawn", 1, 2), Edge("join", 7, 8)]
            assert graph.nodes[7].message is not None and graph.nodes[7].message.text == "It is done."

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("result", "joins"),
    [
        ("14:32 file 1024 bytes", False),
        ("4", True),
        (" 4\n", True),
        ('{"answer": "4"}', True),
        ("Result:\n4\n(agent 1)", True),
    ],
)
def test_a_short_answer_comes_home_only_where_it_stands_alone(tmp_path: Path, result: str, joins: bool) -> None:
    async def scene() -> None:
        async with live_gateway(tmp_path, [call_of("task", prompt=PROMPT), "4", "On."]) as live:
            async with aiohttp.ClientSession() as http:
                caller = Caller(live, http)
                history = [said("user", "How many lines?")]
                answer = message_of(await caller.ask(history, tools=[TASK_TOOL]))
                await caller.ask([said("user", PROMPT)])
                call_id = answer["tool_calls"][0]["id"]
                results = {"role": "tool", "tool_call_id": call_id, "content": result}
                await caller.ask([*history, answer, results], tools=[TASK_TOOL])
            kinds = [edge.kind for edge in live.store.graph("r1").edges]
            assert kinds == (["spawn", "join"] if joins else ["spawn"])

    asyncio.run(scene())


def test_headers_tell_the_parent_where_content_says_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        async with live_gateway(tmp_path, ["one", "two"]) as live, aiohttp.ClientSession() as http:
            caller = Caller(live, http)
            await caller.ask([said("user", "main")], {"x-session-id": "main"})
            await caller.ask([said("user", "other")], {"x-session-id": "sub", "x-parent-session-id": "main"})
            assert live.store.graph("r1").edges == [Edge("spawn", 1, 2, "header")]

    asyncio.run(scene())


def test_a_conversation_that_goes_on_from_a_summary(tmp_path: Path) -> None:
    async def scene() -> None:
        async with live_gateway(tmp_path, ["fine", SUMMARY, "on"]) as live, aiohttp.ClientSession() as http:
            caller = Caller(live, http)
            history = [said("user", "count"), said("assistant", "fine")]
            await caller.ask(history[:1])
            await caller.ask([*history, said("user", "Summarise what you did.")])
            await caller.ask([said("user", f"Earlier work:\n{SUMMARY}\nGo on.")])
            graph = live.store.graph("r1")
            assert [node.reason for node in graph.nodes] == [
                "root",
                "append",
                "append",
                "append",
                "compaction",
                "append",
            ]
            assert graph.edges == [Edge("compaction", 3, 4)]

    asyncio.run(scene())


def test_a_summary_is_known_by_what_stands_between_its_tags(tmp_path: Path) -> None:
    async def scene() -> None:
        tagged = f"<analysis>\nfine\n</analysis>\n<summary>\n{SUMMARY}\n\n\nIt is done.\n</summary>"
        async with live_gateway(tmp_path, ["fine", tagged, "on"]) as live, aiohttp.ClientSession() as http:
            caller = Caller(live, http)
            await caller.ask([said("user", "count")])
            await caller.ask([said("user", "count"), said("assistant", "fine"), said("user", "Summarise.")])
            await caller.ask([said("user", f"Summary:\n{SUMMARY}\n\nIt is done.\nGo on.")])
            assert live.store.graph("r1").edges == [Edge("compaction", 3, 4)]

    asyncio.run(scene())


def test_a_summary_may_come_back_as_the_models_own_words_and_an_edited_history_is_none(tmp_path: Path) -> None:
    async def scene() -> None:
        async with live_gateway(tmp_path, ["fine", SUMMARY, "on", "no"]) as live, aiohttp.ClientSession() as http:
            caller = Caller(live, http)
            work, summarise = said("system", "You work."), said("system", "You summarise.")
            await caller.ask([work, said("user", "count")])
            await caller.ask([summarise, said("user", "They counted.")])
            handed_on = [said("user", "What was done?"), said("assistant", SUMMARY), said("user", "Go on.")]
            await caller.ask([work, *handed_on])
            graph = live.store.graph("r1")
            assert graph.edges == [Edge("compaction", 5, 6)]
            assert [node.reason for node in graph.nodes][6:] == ["compaction", "append", "append", "append"]
            # The same question under another system prompt: the history was edited.
            edited = [said("user", "They counted."), said("assistant", SUMMARY), said("user", "Go on.")]
            await caller.ask([said("system", "You write."), *edited])
            graph = live.store.graph("r1")
            assert len(graph.edges) == 1
            assert [node.reason for node in graph.nodes][10:] == ["root", "append", "append", "append", "append"]

    asyncio.run(scene())


def test_two_threads_that_are_compacted_at_the_same_time(tmp_path: Path) -> None:
    """Codex names the purpose of a request; its summaries are told by that where they are not repeated word by word."""

    async def scene() -> None:
        async with live_gateway(tmp_path, ["a", "b", "short", "brief", "on", "on"]) as live:
            async with aiohttp.ClientSession() as http:
                caller = Caller(live, http)
                for thread in ("t1", "t2"):
                    await caller.ask([said("user", f"work of {thread}")], {"thread-id": thread})
                for thread in ("t1", "t2"):
                    headers = {"thread-id": thread, "x-codex-turn-metadata": '{"request_kind": "compaction"}'}
                    await caller.ask([said("user", f"sum up {thread}")], headers)
                for thread in ("t1", "t2"):
                    await caller.ask([said("user", f"go on with {thread}")], {"thread-id": thread})
            graph = live.store.graph("r1")
            assert graph.edges == [Edge("compaction", 5, 8, "header"), Edge("compaction", 7, 10, "header")]

    asyncio.run(scene())


def test_side_calls_are_answered_and_masked(tmp_path: Path) -> None:
    async def scene() -> None:
        async with live_gateway(tmp_path, ["a title", "x", "an answer"]) as live, aiohttp.ClientSession() as http:
            caller = Caller(live, http, max_calls=1)
            await caller.ask([said("user", "Title?")], model="small-auxiliary")
            await caller.ask([said("user", "quota")], max_tokens=1)
            await caller.ask([said("user", "work")])
            graph = live.store.graph("r1")
            assert [node.auxiliary for node in graph.nodes if node.num_sampled] == ["side-model", "probe", ""]
            assert [graph.withheld(node) for node in graph.nodes if node.num_sampled] == [
                "auxiliary",
                "auxiliary",
                None,
            ]
            assert [node.reason for node in graph.nodes if node.parent is None] == ["auxiliary", "auxiliary", "root"]

    asyncio.run(scene())


def test_another_continuation_is_a_branch_and_a_rewritten_answer_an_edit(tmp_path: Path) -> None:
    async def scene() -> None:
        async with live_gateway(tmp_path, ["one", "two", "three", "four"]) as live, aiohttp.ClientSession() as http:
            caller = Caller(live, http)
            history = [said("user", "count"), said("assistant", " one\n")]
            await caller.ask(history[:1])
            await caller.ask([*history, said("user", "on")])
            await caller.ask([*history, said("user", "or else")])
            await caller.ask([said("user", "count"), said("assistant", "eleven"), said("user", "on")])
            assert [node.reason for node in live.nodes()] == [
                "root", "append", "append", "append", "branch", "append", "edited", "append", "append",
            ]  # fmt: skip

    asyncio.run(scene())
