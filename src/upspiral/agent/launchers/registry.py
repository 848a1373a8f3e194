"""Which agents we can start, by the name in the run file."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from upspiral.agent.launchers.base import Launcher
from upspiral.agent.launchers.claude_code import ClaudeCode
from upspiral.agent.launchers.codex import Codex
from upspiral.agent.launchers.opencode import OpenCode
from upspiral.agent.launchers.python_program import PythonProgram
from upspiral.agent.launchers.qwen_code import QwenCode
from upspiral.errors import AgentError

LAUNCHERS: Mapping[str, Launcher] = {
    launcher.name: launcher
    for launcher in (
        ClaudeCode(),
        Codex(),
        OpenCode(),
        QwenCode(),
        PythonProgram("mini-swe-agent"),
        PythonProgram("smolagents"),
        PythonProgram("openai-agents"),
        PythonProgram("pydantic-ai"),
        PythonProgram("langgraph"),
    )
}


def launcher_of(name: str) -> Launcher:
    """Raises AgentError naming the nearest agent when there is none of that name."""
    if name in LAUNCHERS:
        return LAUNCHERS[name]
    close = get_close_matches(name, LAUNCHERS, n=1, cutoff=0.5)
    raise AgentError(
        f"no agent {name!r}; " + (f"did you mean {close[0]}?" if close else f"known agents: {', '.join(LAUNCHERS)}")
    )
