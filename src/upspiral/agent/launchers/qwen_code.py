"""qwen-code: the Qwen team's command line agent. Speaks chat completions."""

from __future__ import annotations

import json
from dataclasses import dataclass

from upspiral.agent.base import AgentTask
from upspiral.agent.launchers.base import FOLDER, GATEWAY_URL, Launch

_SETTINGS = {
    "security": {"auth": {"selectedType": "openai"}},
    "general": {"enableAutoUpdate": False, "disableAutoUpdate": True, "disableUpdateNag": True},
    "privacy": {"usageStatisticsEnabled": False},
    "telemetry": {"enabled": False},
}


@dataclass(frozen=True, slots=True)
class QwenCode:
    """Satisfies Launcher."""

    name: str = "qwen-code"

    def launch(self, task: AgentTask) -> Launch:
        node = f"{FOLDER}/node_modules/node-linux-*/bin/node"
        return Launch(
            f"exec {node} {FOLDER}/node_modules/@qwen-code/qwen-code/cli-entry.js --approval-mode yolo",
            {"OPENAI_BASE_URL": GATEWAY_URL, "OPENAI_API_KEY": task.api_key, "OPENAI_MODEL": task.model},
            {".qwen/settings.json": json.dumps(_SETTINGS)},
        )
