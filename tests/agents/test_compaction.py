"""Agents that run out of context and compact their history by their own means: they were told a window and saw the
usage that the gateway reports, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agents.stage import ANSWER, Played, Terms, check_done, check_exact, hermes, play

CREATE = "mkdir -p notes && echo 'buy bread' > notes/plan.txt"
CHANGE = "sed -i s/bread/cheese/ notes/plan.txt && cat notes/plan.txt"
FILL = "ls -R; seq 4000"
"""Prints more than the window has left."""
LOOK = "cat notes/plan.txt"
READ = "cat harbour.txt"
SUMMARY = "The plan says cheese now.\n\n\nAll that is left is to read harbour.txt and to say that it is done."
SHELLS = {
    "claude-code": ("Bash", "command"),
    "codex": ("exec_command", "cmd"),
    "opencode": ("bash", "command"),
}
WINDOWS = {"claude-code": 60_000, "codex": 34_000, "opencode": 38_000}
"""Tokens, between what the agent's prompt takes of the tiny tokenizer before and after FILL."""
SUMMARIES = {"claude-code": f"<analysis>\nIt is nearly done.\n</analysis>\n\n<summary>\n{SUMMARY}\n</summary>"}
"""In the form that the agent asks for."""
ROOTS = {"claude-code": ["root"], "codex": ["root", "tools"], "opencode": ["root", "spawn"]}
"""Claude Code asks for the summary at the end of the conversation, Codex too but without tools, so that its prompt is
another one from the start, and opencode in a conversation of its own that quotes the calls."""


def compacted(work: Path, agent: str) -> Played:
    tool, argument = SHELLS[agent]
    create, change, fill, look, read = (
        hermes(tool, {argument: command, "description": "Work"}) for command in (CREATE, CHANGE, FILL, LOOK, READ)
    )
    script = [create, change, fill, look, SUMMARIES.get(agent, SUMMARY), read, ANSWER]
    return play(work, agent, script, Terms(context_length=WINDOWS[agent]))


@pytest.mark.parametrize("agent", SHELLS)
def test_a_history_that_the_agent_compacts_goes_on_from_its_summary(tmp_path: Path, agent: str) -> None:
    played = compacted(tmp_path, agent)
    check_done(played)
    check_exact(played)
    graph = played.graph
    summary = next(node for node in graph.nodes if node.message and SUMMARY in node.message.text)
    compactions = [edge for edge in graph.edges if edge.kind == "compaction"]
    assert [(edge.source, edge.evidence) for edge in compactions] == [(summary.id, "content")]
    start = graph.nodes[compactions[0].target]
    assert start.reason == "compaction"
    # Everything that was sampled after the summary continues the conversation that begins with it.
    later = [node for node in graph.nodes if node.num_sampled and node.id > summary.id]
    assert len(later) == 2
    assert all(start in graph.path(node.id) for node in later)
    assert [node.reason for node in graph.roots()] == ROOTS[agent]
    assert not any(node.reason == "edited" for node in graph.nodes)
