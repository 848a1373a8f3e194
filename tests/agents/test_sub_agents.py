"""Agents that start agents: each conversation is a tree of its own, tied to the call that started it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agents.stage import ANSWER, TASK, check_done, check_exact, hermes, play
from upspiral.engine.scripted import ScriptLine

ERRAND = "Write the word anchor into the file notes/word.txt and report which word you wrote."
REPORT = "The errand is done, and the word that I wrote is anchor."
CREATE = "mkdir -p notes && echo 'buy bread' > notes/plan.txt"
CHANGE = "sed -i s/bread/cheese/ notes/plan.txt && cat harbour.txt && sleep 0.5"
"""On a busy machine qwen-code reports no output of a command that ends as soon as it has spoken."""
WRITE_WORD = "mkdir -p notes && echo anchor > notes/word.txt"
WAIT_FOR_WORD = "until grep -q anchor notes/word.txt; do sleep 0.1; done; sleep 1"
"""For agents that send sub-agents off and go on."""


def main_line(text: str) -> ScriptLine:
    """Only the main agent was told the task."""
    return ScriptLine(text=text, when=TASK.instruction)


def script(agent: str) -> list[ScriptLine]:
    return {
        "claude-code": [
            main_line(hermes("Bash", {"command": CREATE, "description": "Create"})),
            main_line(hermes("Agent", {"description": "Run an errand", "prompt": ERRAND, "run_in_background": False})),
            main_line(hermes("Bash", {"command": CHANGE, "description": "Change"})),
            main_line(ANSWER),
            ScriptLine(hermes("Bash", {"command": WRITE_WORD, "description": "Write"})),
            ScriptLine(REPORT),
        ],
        "codex": [
            main_line(hermes("exec_command", {"cmd": CREATE})),
            main_line(hermes("multi_agent_v1__spawn_agent", {"message": ERRAND})),
            main_line(hermes("exec_command", {"cmd": WAIT_FOR_WORD})),
            main_line(hermes("exec_command", {"cmd": CHANGE})),
            main_line(ANSWER),
            ScriptLine(hermes("exec_command", {"cmd": WRITE_WORD})),
            ScriptLine(REPORT),
        ],
        "opencode": [
            main_line(hermes("bash", {"command": CREATE, "description": "Create"})),
            main_line(hermes("task", {"description": "Run an errand", "prompt": ERRAND, "subagent_type": "general"})),
            main_line(hermes("bash", {"command": CHANGE, "description": "Change"})),
            main_line(ANSWER),
            ScriptLine(hermes("bash", {"command": WRITE_WORD, "description": "Write"})),
            ScriptLine(REPORT),
        ],
        "qwen-code": qwen_code_script(run_in_background=False),
    }[agent]


def qwen_code_script(*, run_in_background: bool) -> list[ScriptLine]:
    """It sends a sub-agent off unless it is told to wait. Then the result comes as a turn of its own, after the main
    agent's last answer, and wants another."""
    shell, how = "run_shell_command", {} if run_in_background else {"run_in_background": False}
    errand = {"description": "Run an errand", "prompt": ERRAND, "subagent_type": "general-purpose", **how}
    return [
        main_line(hermes(shell, {"command": CREATE, "is_background": False})),
        main_line(hermes("agent", errand)),
        main_line(hermes(shell, {"command": CHANGE, "is_background": False})),
        *([main_line("I wait for the errand.")] if run_in_background else []),
        main_line(ANSWER),
        ScriptLine(hermes(shell, {"command": WRITE_WORD, "is_background": False})),
        # Slow, so that the main agent is there first.
        ScriptLine(REPORT, pause_s=2.0 if run_in_background else 0.0),
    ]


@pytest.mark.parametrize("agent", ["claude-code", "codex", "opencode", "qwen-code"])
def test_a_sub_agent_is_a_tree_that_its_call_started(tmp_path: Path, agent: str) -> None:
    played = play(tmp_path, agent, script(agent))
    check_done(played)
    check_exact(played)
    roots = played.graph.roots()
    assert [node.reason for node in roots] == ["root", "spawn"]


def test_a_sub_agent_in_the_background_comes_home_in_a_later_turn(tmp_path: Path) -> None:
    played = play(tmp_path, "qwen-code", qwen_code_script(run_in_background=True))
    check_done(played)
    check_exact(played)
    graph = played.graph
    assert [node.reason for node in graph.roots()] == ["root", "spawn"]
    report = next(node for node in graph.nodes if node.num_sampled and node.message and node.message.text == REPORT)
    home = next(edge for edge in graph.edges if edge.kind == "join")
    assert (home.source, graph.nodes[home.target].role) == (report.id, "user")
