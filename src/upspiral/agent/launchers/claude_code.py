"""Claude Code: Anthropic's command line agent. Speaks Anthropic Messages."""

from __future__ import annotations

import json
from dataclasses import dataclass

from upspiral.agent.base import AgentTask
from upspiral.agent.launchers.base import FOLDER, GATEWAY_ORIGIN, Launch, auxiliary_model

_QUIET = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "CLAUDE_CODE_DISABLE_TERMINAL_TITLE": "1",
    "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}


_COMPACT_AT = 0.75
"""Of the model's context: the rest is for the tool result that it did not foresee, the request for a summary and the
summary."""
_KEPT_FREE = 33_000
"""Tokens that Claude Code takes off the window that it believes in: it compacts when no more are left. In a window of
32,000 it would never do anything else."""


@dataclass(frozen=True, slots=True)
class ClaudeCode:
    """Satisfies Launcher."""

    name: str = "claude-code"

    def launch(self, task: AgentTask) -> Launch:
        flags = "--print --output-format text --permission-mode bypassPermissions"
        env = {
            **_QUIET,
            "ANTHROPIC_BASE_URL": GATEWAY_ORIGIN,
            "ANTHROPIC_AUTH_TOKEN": task.api_key,
            "ANTHROPIC_MODEL": task.model,
            "ANTHROPIC_DEFAULT_OPUS_MODEL": task.model,
            "ANTHROPIC_DEFAULT_SONNET_MODEL": task.model,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": auxiliary_model(task),
            "ANTHROPIC_SMALL_FAST_MODEL": auxiliary_model(task),
            "IS_SANDBOX": "1",
        }
        if task.context_length:
            # Its setting for when to compact takes nothing below 100,000, what it takes for the window anything.
            window = int(_COMPACT_AT * task.context_length) + _KEPT_FREE
            env["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(window)
        settings = json.dumps({"env": {"CLAUDE_CODE_ATTRIBUTION_HEADER": "0"}})
        binary = f"{FOLDER}/node_modules/@anthropic-ai/claude-code-linux-*/claude"
        return Launch(f"exec {binary} {flags}", env, {".claude/settings.json": settings})
