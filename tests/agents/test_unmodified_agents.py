"""Agents that others made, unmodified, in the sandbox: four tool calls each, and every token where it belongs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tests.agents.stage import ANSWER, check_done, check_exact, hermes, play
from upspiral.agent.launchers.codex import Codex
from upspiral.agent.launchers.registry import LAUNCHERS
from upspiral.types import Message

Call = tuple[str, Mapping[str, Any]]
SHELL_COMMANDS = (
    "mkdir -p notes && echo 'buy bread' > notes/plan.txt",
    "sed -i s/bread/cheese/ notes/plan.txt && cat notes/plan.txt",
    "ls -R",
    # On a busy machine qwen-code reports no output of a command that ends as soon as it has spoken.
    "cat harbour.txt && sleep 0.5",
)


def shell_calls(tool: str, argument: str, **others: Any) -> list[Call]:
    return [(tool, {argument: command, **others}) for command in SHELL_COMMANDS]


CALLS: Mapping[str, Sequence[Call]] = {
    "claude-code": [
        ("Write", {"file_path": "/work/notes/plan.txt", "content": "buy bread\n"}),
        ("Edit", {"file_path": "/work/notes/plan.txt", "old_string": "bread", "new_string": "cheese"}),
        ("Bash", {"command": "ls -R", "description": "List the folder"}),
        ("Read", {"file_path": "/work/harbour.txt"}),
    ],
    "codex": shell_calls("exec_command", "cmd"),
    "opencode": [
        ("write", {"filePath": "/work/notes/plan.txt", "content": "buy bread\n"}),
        ("edit", {"filePath": "/work/notes/plan.txt", "oldString": "bread", "newString": "cheese"}),
        ("bash", {"command": "ls -R", "description": "List the folder"}),
        ("read", {"filePath": "/work/harbour.txt"}),
    ],
    "qwen-code": [
        ("write_file", {"file_path": "/work/notes/plan.txt", "content": "buy bread\n"}),
        ("edit", {"file_path": "/work/notes/plan.txt", "old_string": "bread", "new_string": "cheese"}),
        ("list_directory", {"path": "/work"}),
        ("read_file", {"file_path": "/work/harbour.txt"}),
    ],
    "mini-swe-agent": [
        *shell_calls("bash", "command"),
        ("bash", {"command": f"echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && echo '{ANSWER}'"}),
    ],
    "smolagents": [*shell_calls("shell", "command"), ("final_answer", {"answer": ANSWER})],
    "openai-agents": shell_calls("shell", "command"),
    "pydantic-ai": shell_calls("shell", "command"),
    "langgraph": shell_calls("shell", "command"),
}
ENDS_WITH_A_CALL = {"mini-swe-agent", "smolagents"}
FORCED = '<tool_call>\n{"name": "'
"""smolagents asks with tool_choice "required": this stands in its prompts behind the generation prompt, not sampled."""


def script(agent: str) -> list[str]:
    calls = [hermes(*call) for call in CALLS[agent]]
    if agent == "smolagents":
        return [call.removeprefix(FORCED) for call in calls]
    return calls if agent in ENDS_WITH_A_CALL else [*calls, ANSWER]


RETELLS_ITS_CALLS = {"smolagents"}
"""It sends its own calls back as text that describes them, so each turn goes on from an edited history."""


def test_every_agent_is_here() -> None:
    assert set(CALLS) == set(LAUNCHERS)


@pytest.mark.parametrize("agent", CALLS)
def test_an_unmodified_agent_does_a_task_and_no_token_is_lost(tmp_path: Path, agent: str) -> None:
    played = play(tmp_path, agent, script(agent))
    check_done(played)
    check_exact(played)
    assert len(played.calls) == len(script(agent))
    assert [node.reason for node in played.graph.roots()] == ["root"]
    forks = [node.reason for node in played.graph.nodes if node.reason not in ("root", "append")]
    assert forks == ["edited"] * (len(played.calls) - 1 if agent in RETELLS_ITS_CALLS else 0)
    assert len(played.graph.leaves()) == 1 + len(forks)


def test_codex_does_its_task_over_a_websocket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes in its prompt first (generate=false), then continues each response with what is new alone."""
    monkeypatch.setitem(cast(dict[str, Any], LAUNCHERS), "codex", Codex(websockets=True))
    played = play(tmp_path, "codex", script("codex"))
    check_done(played)
    check_exact(played)
    assert len(played.calls) == len(script("codex")) and len(played.graph.leaves()) == 1
    assert {node.reason for node in played.graph.nodes} == {"root", "append"}
    assert played.visits["websocket", "/v1/responses"] == 1 and not played.visits["http", "/v1/responses"]


def test_smolagents_retells_its_calls_and_every_prompt_continues_the_one_before(tmp_path: Path) -> None:
    """The model reads a description of its call, as it does without a gateway: an edit, not another spelling of the
    answer. It costs the description's tokens; no prompt is computed twice."""
    played = play(tmp_path, "smolagents", script("smolagents"))
    check_exact(played)
    graph = played.graph
    retold = [node for node in graph.nodes if node.reason == "edited"]
    for node in retold:
        answer = next(each for each in graph.children(node.parent) if each.num_sampled)
        assert answer.message and node.message and node.message.text == told(answer.message)
    last = graph.leaves()[-1]
    assert [node.id for node in graph.path(last.id) if node.reason == "edited"] == [node.id for node in retold]


def told(answer: Message) -> str:
    """What smolagents makes of an answer."""
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
        for call in answer.tool_calls
    ]
    return f"Calling tools:\n{calls}"
