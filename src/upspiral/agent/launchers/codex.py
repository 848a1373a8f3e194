"""Codex: OpenAI's command line agent. Speaks Responses."""

from __future__ import annotations

import json
from dataclasses import dataclass

from upspiral.agent.base import AgentTask
from upspiral.agent.launchers.base import FOLDER, GATEWAY_URL, Launch

_CONFIG = """\
model = {model}
model_provider = "gateway"
{window}web_search = "disabled"
check_for_update_on_startup = false
analytics.enabled = false
feedback.enabled = false
history.persistence = "none"
[model_providers.gateway]
name = "gateway"
base_url = "{url}"
env_key = "OPENAI_API_KEY"
wire_api = "responses"
supports_websockets = {websockets}
"""


@dataclass(frozen=True, slots=True)
class Codex:
    """Satisfies Launcher."""

    name: str = "codex"
    websockets: bool = False
    """Whether it is told that the gateway has WebSockets. It is asked the same and answers the same over both."""

    def launch(self, task: AgentTask) -> Launch:
        window = f"model_context_window = {task.context_length}\n" if task.context_length else ""
        # A JSON string is a TOML string, and so is true.
        sockets = json.dumps(self.websockets)
        config = _CONFIG.format(model=json.dumps(task.model), window=window, url=GATEWAY_URL, websockets=sockets)
        flags = "--skip-git-repo-check --dangerously-bypass-approvals-and-sandbox"
        binary = f"{FOLDER}/node_modules/@openai/codex-linux-*/vendor/*/bin/codex"
        return Launch(f"exec {binary} exec {flags} -", {"OPENAI_API_KEY": task.api_key}, {".codex/config.toml": config})
